"""A thousand corrupted inputs: nothing crashes, every loss is told, and what was not touched is all there.

Each input is a small valid one, damaged at random by a seeded generator. What was not touched is known exactly for
tars (byte ranges), tables (row groups) and files of vectors (rows). One loss cannot be told: a tar whose last samples
have become zeros ends early, and properly.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.embedder import decode_image
from index.errors import CorpusError, UserError
from index.ingest.build import BuildConfig, build
from index.ingest.readers import Shard, SkippedShard, read
from index.knowledge_base import KnowledgeBase
from index.records import BadSample, Pair
from index.store import PairStore
from tests.fakes import HashEmbedder, caption_of, draw, encode, sample, write_tar

Found = list[Pair | BadSample | SkippedShard | CorpusError]


@dataclass(frozen=True)
class Mutant:
    """Damaged bytes, and how much at their beginning and at their end is as it was."""

    content: bytes
    head: int  # bytes kept at the beginning
    tail: int  # bytes kept at the end

    def kept(self, start: int, end: int, length: int) -> bool:
        """Whether the bytes from `start` to `end` of the `length` original ones are all there."""
        return end <= self.head or start >= length - self.tail


def mutate(content: bytes, rng: random.Random) -> Mutant:
    """Flip, cut, drop, insert, blank or move bytes."""
    length = len(content)
    start = rng.randrange(length)
    end = min(length, start + rng.choice([1, 4, 100, 512, 700, 5000]))
    junk = rng.randbytes(end - start)
    kind = rng.choice(["flip", "flip", "noise", "blank", "cut", "drop", "insert", "move"])
    if kind == "flip":
        junk, end = bytes([content[start] ^ 1 << rng.randrange(8)]), start + 1
    elif kind == "cut":
        return Mutant(content[:start], start, 0)
    elif kind == "insert":
        return Mutant(content[:start] + junk + content[start:], start, length - start)
    elif kind in {"blank", "drop"}:
        junk = bytes(end - start) if kind == "blank" else b""
    elif kind == "move":
        source = rng.randrange(length)
        junk = content[source : source + end - start]
    return Mutant(content[:start] + junk + content[end:], start, length - end)


def read_all(source: Path, *, allow_partial: bool = True) -> Found:
    """Whatever the reader and the decoder make of it."""
    found: Found = []
    try:
        for shard in read(str(source), allow_partial=allow_partial):
            if isinstance(shard, SkippedShard):
                found.append(shard)
                continue
            shard.stamp, shard.digest()
            found += [decoded(item) for item in shard.samples()]
    except CorpusError as error:
        found.append(error)
    for item in found:
        reason = str(item) if isinstance(item, CorpusError) else getattr(item, "reason", "")
        assert "\n" not in reason
        assert "Traceback" not in reason
    return found


def decoded(item: Pair | BadSample) -> Pair | BadSample:
    """As the engine does it: an image that does not decode is a bad sample."""
    if isinstance(item, BadSample) or item.encoded is None:
        return item
    try:
        decode_image(item.encoded)
    except CorpusError as error:
        return BadSample(shard=item.shard, key=item.key, offset=item.image.offset, reason=str(error))
    return item


def pairs_in(found: Found) -> dict[str, Pair]:
    return {item.key: item for item in found if isinstance(item, Pair)}


def losses_in(found: Found) -> list[object]:
    return [item for item in found if not isinstance(item, Pair)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    return tmp_path / "d"


# Tars


def small_tar(form: int = tarfile.USTAR_FORMAT) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A tar of six samples, and where each of them lies."""
    buffer = io.BytesIO()
    places = {}
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(6):
            start = tar.offset
            for name, content in sample(
                number, key=f"{'long/' * 30}{number}" if form != tarfile.USTAR_FORMAT else None
            ).items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            places[name.partition(".")[0]] = (start, tar.offset)
    return buffer.getvalue(), places


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars(place: Path, form: int) -> None:
    content, places = small_tar(form)
    (place / "a.tar").write_bytes(content)
    whole = pairs_in(read_all(place))
    assert set(whole) == set(places)
    for seed in range(100):
        mutant = mutate(content, random.Random(seed))
        (place / "a.tar").write_bytes(mutant.content)
        found = read_all(place)
        pairs = pairs_in(found)
        doubles = {(item.key, item.reason) for item in found if isinstance(item, BadSample)}
        for key, (start, end) in places.items():
            if mutant.kept(start, end, len(content)):
                if (key, "duplicate key") in doubles:  # its headers were copied to an earlier place
                    continue
                assert key in pairs, (seed, key, found)
                assert (pairs[key].encoded, pairs[key].caption) == (whole[key].encoded, whole[key].caption), seed
        assert len(pairs) == len(places) or losses_in(found), seed


def test_hostile_tars(place: Path) -> None:
    """Names that climb out, sizes beyond all bounds, nested and endless headers: ordinary samples or none."""

    def header(name: str, size: int, kind: bytes = b"0") -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    good = [(f"{name}.png", encode(draw(1))) for name in ("../../etc/passwd", "/absolute", "a/../b")]
    members = [item for name, content in good for item in ((name, content), (name.replace("png", "txt"), b"x"))]
    write_tar(place / "climb.tar", members)
    assert set(pairs_in(read_all(place))) == {"../../etc/passwd", "/absolute", "a/../b"}
    assert sorted(path.name for path in place.iterdir()) == ["climb.tar"]
    (place / "climb.tar").unlink()
    tail = small_tar()[0]
    for name, front in {
        "huge": header("x.png", 1 << 62),
        "negative": header("x.png", 0)[:124] + b"\xff" * 12 + header("x.png", 0)[136:],
        "long-name": header("x", 1 << 40, b"L"),
        "endless-names": header("x", 0, b"L") * 2000,
        "directory-of-bytes": header("x.png", 1 << 20, b"5"),
        "overlapping": b"".join(header(f"{i}.png", 512 * (999 - i)) for i in range(1000)) + b"\xff" * 512,
    }.items():
        (place / f"{name}.tar").write_bytes(front + tail)
        found = read_all(place)
        assert len(pairs_in(found)) == 6, name
        (place / f"{name}.tar").unlink()


# Files beside images, and images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_images(place: Path, kind: str) -> None:
    content = encode(draw(7), kind)
    for seed in range(40):
        (place / "a.png").write_bytes(mutate(content, random.Random(seed)).content)
        (place / "a.txt").write_text("a picture")
        (place / "b.png").write_bytes(encode(draw(8)))
        (place / "b.txt").write_text("another")
        found = read_all(place)
        assert "b.png" in pairs_in(found)
        assert {item.key for item in found if isinstance(item, Pair | BadSample)} == {"a.png", "b.png"}, seed


def test_json_beside_images(place: Path) -> None:
    content = json.dumps({"caption": "one \ud83d\ude00", "n": [1, 2.5, None], "deep": {"x": "y"}}).encode()
    (place / "a.png").write_bytes(encode(draw(1)))
    for seed in range(150):
        (place / "a.json").write_bytes(mutate(content, random.Random(seed)).content)
        (item,) = read_all(place)
        assert isinstance(item, Pair | BadSample)
        if isinstance(item, Pair):
            json.dumps(dict(item.metadata), allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_files(place: Path, name: str) -> None:
    for i in range(6):
        (place / f"{i}.png").write_bytes(encode(draw(i)))
    if name == "metadata.jsonl":
        lines = [json.dumps({"file_name": f"{i}.png", "text": caption_of(i)}) for i in range(6)]
    else:
        lines = ["file_name,text", *(f'{i}.png,"{caption_of(i)}, yes"' for i in range(6))]
    content = ("\n".join(lines) + "\n").encode()
    for seed in range(75):
        mutant = mutate(content, random.Random(seed))
        (place / name).write_bytes(mutant.content)
        found = read_all(place)
        pairs, start = pairs_in(found), 0
        assert {f"{i}.png" for i in range(6)} <= {getattr(item, "key", "") for item in found}, seed
        for i, line in enumerate(lines):
            end = start + len(line) + 1
            is_kept = mutant.head >= end if name.endswith("csv") else mutant.kept(max(start - 1, 0), end, len(content))
            if is_kept and line[0] != "f":  # a quote that is lost or won swallows what follows in a csv
                key = f"{i - name.endswith('csv')}.png"
                assert key in pairs or len(pairs) == 0, (seed, key)
            start = end


# Tables


def small_parquet(*, with_checksums: bool) -> bytes:
    """Twenty rows in four row groups."""
    rows = [{"key": f"{i:03d}", "png": encode(draw(i)), "caption": caption_of(i)} for i in range(20)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=5, write_page_checksum=with_checksums)
    return buffer.getvalue()


def group_places(content: bytes) -> list[tuple[int, int]]:
    """Where the row groups lie."""
    about = pq.read_metadata(io.BytesIO(content))
    chunks = [[about.row_group(g).column(c) for c in range(about.num_columns)] for g in range(about.num_row_groups)]
    starts = [min(min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in group) for group in chunks]
    return [
        (start, start + sum(c.total_compressed_size for c in group))
        for start, group in zip(starts, chunks, strict=True)
    ]


@pytest.mark.parametrize("with_checksums", [True, False])
def test_parquet(place: Path, with_checksums: bool) -> None:
    content = small_parquet(with_checksums=with_checksums)
    groups = group_places(content)
    (place / "a.parquet").write_bytes(content)
    whole = pairs_in(read_all(place))
    assert len(whole) == 20
    for seed in range(100):
        mutant = mutate(content, random.Random(seed))
        (place / "a.parquet").write_bytes(mutant.content)
        found = read_all(place)
        pairs = pairs_in(found)
        is_footer_kept = len(mutant.content) == len(content) and mutant.kept(groups[-1][1], len(content), len(content))
        for group, (start, end) in enumerate(groups):
            if is_footer_kept and mutant.kept(start, end, len(content)):
                for key in list(whole)[group * 5 : group * 5 + 5]:
                    assert key in pairs, (seed, key, losses_in(found))
                    assert pairs[key].encoded == whole[key].encoded
        assert len(pairs) == 20 or losses_in(found), seed


def test_vectors_and_their_tables(place: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 8)).astype(np.float16)
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"caption": caption_of(i), "image_path": str(i)} for i in range(30)]), table)
    files = {"img_emb/img_emb_0.npy": buffer.getvalue(), "metadata/metadata_0.parquet": table.getvalue()}
    for name, content in files.items():
        (place / name).parent.mkdir()
        (place / name).write_bytes(content)
    whole = pairs_in(read_all(place))
    assert len(whole) == 30
    for seed in range(150):
        name = list(files)[seed % 3 == 0]
        mutant = mutate(files[name], random.Random(seed))
        (place / name).write_bytes(mutant.content)
        found = read_all(place)
        pairs = pairs_in(found)
        assert len(pairs) == 30 or losses_in(found), seed
        header = len(buffer.getvalue()) - vectors.nbytes
        if (
            name.endswith("npy")
            and mutant.kept(0, header, len(buffer.getvalue()))
            and len(mutant.content) == len(files[name])
        ):
            for i in range(30):
                if mutant.kept(header + 16 * i, header + 16 * i + 16, len(files[name])):
                    assert np.array_equal(pairs[str(i)].vector, whole[str(i)].vector), seed
        (place / name).write_bytes(files[name])


# Whole builds


def mutants_of(seed: int) -> dict[str, bytes]:
    """Thirty damaged shards of every kind."""
    rng = random.Random(seed)
    tar, parquet = small_tar()[0], small_parquet(with_checksums=False)
    files = {}
    for i in range(15):
        files[f"tars/{i}.tar"] = mutate(tar, rng).content
    for i in range(10):
        files[f"tables/{i}.parquet"] = mutate(parquet, rng).content
    for i in range(5):
        members = sample(i, key="a")
        victim = rng.choice(list(members))
        members[victim] = mutate(members[victim], rng).content
        files |= {f"folders/{i}/{name}": content for name, content in members.items()}
    return files


@pytest.mark.parametrize("allow_partial", [True, False])
def test_builds_of_damaged_shards_among_good_ones(place: Path, tmp_path: Path, allow_partial: bool) -> None:
    for name, content in mutants_of(seed=int(allow_partial)).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    write_tar(place / "good" / "a.tar", {n: c for i in range(100, 110) for n, c in sample(i).items()})
    config = BuildConfig(max_bad_fraction=1.0, allow_partial=allow_partial)
    report = build(KnowledgeBase.create(tmp_path / "kb", HashEmbedder()), [str(place)], config)
    store = PairStore(tmp_path / "kb")
    kept = store.get(store.matching_ids("shard = 'good/a.tar'"))
    assert sorted(pair.caption for pair in kept) == sorted(caption_of(i) for i in range(100, 110))
    in_sources = {shard.name for shard in read(str(place), allow_partial=allow_partial) if isinstance(shard, Shard)}
    assert {record.shard for record in store.shards()} == in_sources
    assert report.shards_skipped + len(in_sources) == 31
    assert report.quarantined == store.count_bad() > 0
    again = build(KnowledgeBase.open(tmp_path / "kb", HashEmbedder()), [str(place)], config)
    assert (again.pairs_added, again.quarantined) == (0, report.quarantined)


@pytest.mark.parametrize("make", [lambda: small_tar()[0], lambda: small_parquet(with_checksums=True)])
def test_a_source_of_one_damaged_file_ends_in_a_sentence_or_a_knowledge_base(
    place: Path, tmp_path: Path, make: Callable[[], bytes]
) -> None:
    content = make()
    name = "a.parquet" if content[:4] == b"PAR1" else "a.tar"
    for seed in range(6):
        (place / name).write_bytes(mutate(content, random.Random(seed)).content)
        kb = KnowledgeBase.create(tmp_path / f"kb{seed}", HashEmbedder())
        sentence = ""
        try:
            build(kb, [str(place)], BuildConfig())
        except UserError as error:
            sentence = str(error)
        assert "\n" not in sentence
        assert sentence or kb.store.count()
