"""`radt index neighbors`: equal to asking one by one, its own group never there, resumable, in bounded memory."""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.errors import ConfigError, CorpusError
from index.ingest.build import BuildConfig, build
from index.knowledge_base import KnowledgeBase
from index.search import neighbors as module
from index.search.copies import Copies
from index.search.neighbors import METADATA_KEY, NeighborsConfig, write_neighbors
from index.search.retriever import Retriever
from index.store import PairStore
from tests.fakes import HashEmbedder, caption_of, draw, encode, sample, write_img2dataset, write_tar
from tests.shell import Shell

ROOT = Path(__file__).parents[2]


def make_kb(folder: Path, *sources: Path) -> KnowledgeBase:
    kb = KnowledgeBase.create(folder, HashEmbedder())
    build(kb, [str(source) for source in sources], BuildConfig(searcher="exact"))
    return kb


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards of ten pairs, one picture of each under another caption in the next shard as well."""
    for shard in range(3):
        members: dict[str, bytes] = {}
        for i in range(10):
            members |= sample(shard * 10 + i)
        twin = sample((shard * 10 + 10) % 30, key=f"twin{shard}")
        members |= twin | {f"twin{shard}.txt": f"another view of number {shard}".encode()}
        write_tar(tmp_path / "train" / f"{shard:05d}.tar", members)
    return tmp_path / "train"


@pytest.fixture
def kb(source: Path, tmp_path: Path) -> KnowledgeBase:
    return make_kb(tmp_path / "kb", source)


@pytest.mark.parametrize("by", ["hybrid", "clip", "bm25"])
@pytest.mark.parametrize("query", ["caption", "image"])
def test_it_equals_asking_one_by_one(
    kb: KnowledgeBase, source: Path, tmp_path: Path, by: Literal["hybrid", "clip", "bm25"], query: Any
) -> None:
    if (by, query) == ("bm25", "image"):
        with pytest.raises(ConfigError, match="no effect"):
            NeighborsConfig(by=by, query=query)
        return
    config = NeighborsConfig(k=5, by=by, query=query)
    report = write_neighbors(kb, str(source), tmp_path / "n.parquet", config)
    rows = rows_of(tmp_path / "n.parquet")
    stored = {pair.id: pair for pair in kb.store.get(kb.store.matching_ids(), vectors=True)}
    assert [row["id"] for row in rows] == kb.store.matching_ids().tolist()
    assert (report.pairs, report.shards_done, report.bad) == (33, 3, 0)
    for row in rows:
        own = stored[row["id"]]
        group = [pair.id for pair in stored.values() if pair.sha256 == own.sha256]
        vector = own.vector if query == "image" else None
        hits = kb.search(row["caption"], vector=vector, k=5, by=by, exclude=group)
        assert row["neighbor_ids"] == [hit.id for hit in hits]
        np.testing.assert_allclose(row["scores"], [hit.score for hit in hits], rtol=1e-6)
        assert (row["caption"], row["key"], row["shard"]) == (own.caption, own.key, own.shard)


@pytest.mark.parametrize("query", ["caption", "image"])
def test_its_own_group_never_appears(kb: KnowledgeBase, source: Path, tmp_path: Path, query: Any) -> None:
    out = tmp_path / "n.parquet"
    write_neighbors(kb, str(source), out, NeighborsConfig(k=33, query=query))
    digests = {pair.id: pair.sha256 for pair in kb.store.get(kb.store.matching_ids())}
    for row in rows_of(out):
        assert digests[row["id"]] not in {digests[i] for i in row["neighbor_ids"]}
        assert len(row["neighbor_ids"]) == 29  # all the other pictures
    write_neighbors(kb, str(source), out, NeighborsConfig(k=33, query=query, exclude_group=False, by="clip"))
    if query == "image":
        assert all(digests[row["neighbor_ids"][0]] == digests[row["id"]] for row in rows_of(out))
    assert all(len(row["neighbor_ids"]) == 30 for row in rows_of(out))


def test_a_copy_under_another_name_is_left_out_too(kb: KnowledgeBase, tmp_path: Path) -> None:
    """The training set need not be in the knowledge base: its pictures are known by their content."""
    write_tar(tmp_path / "other" / "a.tar", [*sample(7, key="x").items(), *sample(77, key="y").items()])
    write_neighbors(kb, str(tmp_path / "other"), tmp_path / "n.parquet", NeighborsConfig(k=40))
    known, new = rows_of(tmp_path / "n.parquet")
    captions = {pair.id: pair.caption for pair in kb.store.get(kb.store.matching_ids())}
    assert (len(known["neighbor_ids"]), len(new["neighbor_ids"])) == (29, 30)
    assert caption_of(7) not in {captions[i] for i in known["neighbor_ids"]}


class PixelEmbedder(HashEmbedder):
    """Pictures that look alike have vectors that lie together: what an image is, is its pixels."""

    def __init__(self) -> None:
        super().__init__(dim=192, salt="-pixels")

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        return self._unit([(pixels - pixels.mean()).ravel() for pixels in prepared])


def landscape(number: int) -> PIL.Image.Image:
    """A picture of soft colours, so that a copy of it in another size or format differs little."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((96, 96), PIL.Image.Resampling.BICUBIC)


def saved_again(image: PIL.Image.Image, side: int, quality: int) -> bytes:
    """The picture as a JPEG in another size."""
    buffer = io.BytesIO()
    image.resize((side, side), PIL.Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def copies(number: int) -> dict[int, bytes]:
    """The picture by other sizes; only the first four are there more than once."""
    return {side: saved_again(landscape(number), side, 90) for side in (80, 120, 128)} if number < 4 else {}


def write_landscapes(path: Path, *, with_copies: bool) -> Path:
    """Twelve pictures, each named in its caption, with their copies or without."""
    members: dict[str, bytes] = {}
    for number in range(12):
        members |= {f"{number}.png": encode(landscape(number)), f"{number}.txt": f"landscape {number}".encode()}
        for side, copy in copies(number).items() if with_copies else ():
            members |= {f"{number}-{side}.jpg": copy, f"{number}-{side}.txt": f"landscape {number} at {side}".encode()}
    write_tar(path, members)
    return path.parent


def shown_by(kb: KnowledgeBase) -> dict[int, str]:
    """Which picture each pair shows."""
    return {pair.id: pair.caption.split()[1] for pair in kb.store.get(kb.store.matching_ids())}


@pytest.mark.parametrize(
    ("groups", "by"),
    [("groups", "hybrid"), ("no groups", "clip"), ("no groups", "bm25"), ("newer than the groups", "hybrid")],
)
def test_what_looks_like_it_is_no_neighbour(tmp_path: Path, groups: str, by: Any) -> None:
    """Of pairs that are in the knowledge base and of pictures saved again, whether groups cover the copies or not."""
    kb = KnowledgeBase.create(tmp_path / "kb", PixelEmbedder())
    known = groups != "newer than the groups"
    source = write_landscapes(tmp_path / "train" / "a.tar", with_copies=known)
    build(kb, [str(source)], BuildConfig(searcher="exact", duplicates=groups != "no groups"))
    for number in range(0 if known else 4):
        for side, copy in copies(number).items():
            (tmp_path / "copy.jpg").write_bytes(copy)
            kb.add(tmp_path / "copy.jpg", f"landscape {number} at {side}")
    write_tar(tmp_path / "again" / "b.tar", {"2.jpg": saved_again(landscape(2), 72, 80), "2.txt": b"landscape 2"})
    config, outs = NeighborsConfig(k=24, by=by), (tmp_path / "n.parquet", tmp_path / "m.parquet")
    report = write_neighbors(kb, str(source), outs[0], config)
    write_neighbors(kb, str(tmp_path / "again"), outs[1], config)
    shown = shown_by(kb)
    for row in rows_of(outs[0]) + rows_of(outs[1]):
        assert row["caption"].split()[1] not in {shown[i] for i in row["neighbor_ids"]}
        assert len({shown[i] for i in row["neighbor_ids"]}) == 11
    ungrouped = {"groups": 0, "no groups": 24, "newer than the groups": 12}[groups]
    assert (report.ungrouped, bool(report.warning)) == (ungrouped, ungrouped > 0)


def test_a_group_that_is_larger_than_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without groups, a picture that is there often takes one more search, not one for every few repeats."""
    kb = KnowledgeBase.create(tmp_path / "kb", PixelEmbedder())
    members = {
        f"{i}.{kind}": data
        for i in range(60)
        for kind, data in (("png", encode(landscape(0).resize((96 + i, 96)))), ("txt", b"landscape 0"))
    }
    write_tar(tmp_path / "kb-source" / "a.tar", members)
    build(
        kb,
        [str(write_landscapes(tmp_path / "kb-source" / "b.tar", with_copies=False))],
        BuildConfig(searcher="exact", duplicates=False),
    )
    write_tar(tmp_path / "train" / "a.tar", {"x.jpg": saved_again(landscape(0), 72, 80), "x.txt": b"landscape 0"})
    asked: list[int] = []
    search_many = Retriever.search_many
    monkeypatch.setattr(
        Retriever,
        "search_many",
        lambda self, texts, **rest: asked.append(len(texts)) or search_many(self, texts, **rest),
    )
    write_neighbors(kb, str(tmp_path / "train"), tmp_path / "n.parquet", NeighborsConfig(k=2))
    (row,) = rows_of(tmp_path / "n.parquet")
    assert len(row["neighbor_ids"]) == 2
    assert "0" not in {shown_by(kb)[i] for i in row["neighbor_ids"]}
    assert asked == [1, 1]


KINDS = ("png", "txt")


class StopError(Exception):
    """What stops a run."""


def test_a_run_that_was_stopped_goes_on(kb: KnowledgeBase, source: Path, tmp_path: Path) -> None:
    whole, out, config = tmp_path / "whole.parquet", tmp_path / "n.parquet", NeighborsConfig(k=3)
    write_neighbors(kb, str(source), whole, config)
    for wanted in (0, 1, 2):
        done: list[str] = []

        def stop_after(shard: str, *, after: int = wanted, done: list[str] = done) -> None:
            done.append(shard)
            if len(done) > after:
                raise StopError

        with pytest.raises(StopError):
            write_neighbors(kb, str(source), out, config, on_shard=stop_after)
        assert not out.exists()
    report = write_neighbors(kb, str(source), out, config)
    assert (report.shards_done, report.shards_kept, report.pairs) == (0, 3, 33)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "parquet" in path.name) == ["n.parquet", "whole.parquet"]
    again = write_neighbors(kb, str(source), out, config)
    assert (again.shards_done, again.shards_kept, again.pairs) == (0, 3, 33)


def test_stopped_within_a_shard_leaves_no_half_part(
    kb: KnowledgeBase, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 4)

    def stop(pairs: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        write_neighbors(kb, str(source), tmp_path / "n.parquet", NeighborsConfig(), on_pairs=stop)
    assert [path.name for path in (tmp_path / ".n.parquet.parts").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("moment", ["before the copies are known", "after"])
def test_what_others_commit_while_it_starts_is_seen_by_no_part_of_it(
    kb: KnowledgeBase, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = NeighborsConfig(k=8)
    write_neighbors(kb, str(source), tmp_path / "alone.parquet", config)
    other = KnowledgeBase.open(kb.directory, HashEmbedder())

    class Meanwhile(Copies):
        def __init__(self, *given: Any) -> None:
            if moment != "after":
                other.add([draw(number) for number in range(100, 104)], "a red circle number 1")
            super().__init__(*given)
            if moment == "after":
                other.add([draw(number) for number in range(100, 104)], "a red circle number 1")

    monkeypatch.setattr(module, "Copies", Meanwhile)
    report = write_neighbors(kb, str(source), tmp_path / "n.parquet", config)
    assert (tmp_path / "n.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()
    assert report.snapshot < other.store.version
    assert report.ungrouped == 0


@pytest.mark.parametrize("change", ["settings", "knowledge base", "source"])
def test_what_has_changed_is_looked_up_anew(kb: KnowledgeBase, source: Path, tmp_path: Path, change: str) -> None:
    out, config = tmp_path / "n.parquet", NeighborsConfig(k=3)
    write_neighbors(kb, str(source), out, config)
    if change == "settings":
        config = NeighborsConfig(k=4)
    elif change == "knowledge base":
        (gone,) = kb.store.matching_ids()[:1].tolist()
        kb.remove([gone])
    else:
        write_tar(source / "00001.tar", sample(3))
    report = write_neighbors(kb, str(source), out, config)
    assert report.shards_done == 3
    rows = rows_of(out)
    if change == "settings":
        assert {len(row["neighbor_ids"]) for row in rows} == {4}
    elif change == "knowledge base":
        assert all(gone not in row["neighbor_ids"] for row in rows)
    else:
        assert len(rows) == 23


def test_the_file_says_what_it_was_made_from(kb: KnowledgeBase, source: Path, tmp_path: Path) -> None:
    write_neighbors(kb, str(source), tmp_path / "n.parquet", NeighborsConfig(k=3, by="bm25"))
    made = json.loads(pq.read_schema(tmp_path / "n.parquet").metadata[METADATA_KEY])
    assert (made["settings"]["by"], made["settings"]["snapshot"]) == ("bm25", kb.store.version)
    assert len(made["shards"]) == 3


def test_pictures_that_cannot_be_read_are_counted(kb: KnowledgeBase, tmp_path: Path) -> None:
    members = [*sample(40, key="a").items(), ("b.png", b"?"), ("b.txt", b"no picture"), ("c.png", encode(draw(41)))]
    write_tar(tmp_path / "bad" / "a.tar", members)
    report = write_neighbors(kb, str(tmp_path / "bad"), tmp_path / "n.parquet", NeighborsConfig(query="image"))
    assert (report.pairs, report.bad) == (1, 2)  # c has no caption
    by_caption = write_neighbors(kb, str(tmp_path / "bad"), tmp_path / "n.parquet", NeighborsConfig())
    assert (by_caption.pairs, by_caption.bad) == (2, 1)  # no picture is needed to ask by a caption


def test_pairs_that_bring_their_vectors_are_not_embedded(kb: KnowledgeBase, tmp_path: Path) -> None:
    """What clip-retrieval left: vectors and captions, no images. Its own record is known by its id alone."""
    stored = kb.store.get(kb.store.matching_ids()[:4], vectors=True)
    folder = tmp_path / "laion"
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", np.stack([pair.vector for pair in stored if pair.vector is not None]))
    table = pa.table({"caption": [pair.caption for pair in stored], "image_path": [f"{n}" for n in range(4)]})
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")
    config = NeighborsConfig(k=2, by="clip", query="image", exclude_group=False)
    write_neighbors(kb, str(folder), tmp_path / "n.parquet", config)
    rows = rows_of(tmp_path / "n.parquet")
    assert [row["neighbor_ids"][0] for row in rows] == [pair.id for pair in stored]
    assert all(row["scores"][0] == pytest.approx(1, abs=1e-5) for row in rows)
    write_neighbors(kb, str(folder), tmp_path / "n.parquet", NeighborsConfig(k=2, by="clip", query="image"))
    for row, pair in zip(rows_of(tmp_path / "n.parquet"), stored, strict=True):
        assert pair.id not in row["neighbor_ids"], "an equal vector is the same picture"
    build(kb, [str(folder)], BuildConfig(searcher="exact"))
    write_neighbors(kb, str(folder), tmp_path / "n.parquet", NeighborsConfig(k=2, by="clip", query="image"))
    for row in rows_of(tmp_path / "n.parquet"):
        assert row["id"] not in row["neighbor_ids"]


def test_mistakes(kb: KnowledgeBase, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside the source"):
        write_neighbors(kb, str(source), source / "n.parquet", NeighborsConfig())
    with pytest.raises(CorpusError, match="there is nothing at"):
        write_neighbors(kb, str(tmp_path / "gone"), tmp_path / "n.parquet", NeighborsConfig())
    with pytest.raises(ConfigError, match="k must be at least 1"):
        NeighborsConfig(k=0)


_PEAKS = """
import json, re, sys
import pyarrow as pa
import index.search.neighbors as module
from index.knowledge_base import KnowledgeBase
from tests.fakes import HashEmbedder
module.BATCH, module.GROUP_ROWS = 8, 16
kb, source = KnowledgeBase.open(sys.argv[1], HashEmbedder(dim=8)), sys.argv[2]
module.write_neighbors(kb, source, source + ".parquet", module.NeighborsConfig(k=1, by="bm25"))
# Not ru_maxrss: that begins with what the parent had.
kilobytes = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(json.dumps({"process": int(kilobytes) << 10, "arrow": pa.default_memory_pool().max_memory()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """Of the whole process, Arrow's included: ten times the rows, and the same peak but for a few megabytes."""
    write_img2dataset(tmp_path / "kb-source", shards=1, per_shard=5)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder(dim=8))
    build(kb, [str(tmp_path / "kb-source")], BuildConfig(searcher="exact"))
    noise = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    picture, caption = encode(PIL.Image.fromarray(noise)), b"a dog and a cat " * 250  # 110 and 4 kB
    peaks: dict[int, dict[str, int]] = {}
    for rows in (120, 1200):
        source = tmp_path / f"train{rows}"
        contents = [(f"{i}.{kind}", picture if kind == "png" else caption) for i in range(rows) for kind in KINDS]
        write_tar(source / "a.tar", contents)
        words = [sys.executable, "-c", _PEAKS, str(tmp_path / "kb"), str(source)]
        peaks[rows] = json.loads(subprocess.check_output(words, cwd=ROOT))
    more = {name: peaks[1200][name] - peaks[120][name] for name in ("process", "arrow")}
    assert more["process"] < 30 << 20, peaks  # and 120 MB more of pictures passed
    assert more["arrow"] < 2 << 20, peaks  # and 4.3 MB more of captions


def test_the_command(shell: Shell, source: Path, tmp_path: Path) -> None:
    assert shell("build", source, "--kb", tmp_path / "kb")[0] == 0
    words = ["neighbors", source, "--kb", tmp_path / "kb", "--out", tmp_path / "n.parquet", "-k", 3]
    document = shell.json(*words)
    assert (document["pairs"], document["shards_done"], document["short"]) == (33, 3, 0)
    assert "3 done before" in shell(*words)[1]
    assert pq.read_table(io.BytesIO((tmp_path / "n.parquet").read_bytes())).num_rows == 33
    assert shell.json(*words, "--query", "image", "--by", "clip", "--include-own")["shards_done"] == 3
    assert "no effect" in shell.error(*words, "--query", "image", "--by", "bm25")


@pytest.mark.slow
def test_a_training_picture_saved_again_does_not_meet_its_original(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By the command line, with the model that ships: in another size, as a JPEG, and itself not in there."""
    shell = Shell(capsys, str(ROOT / "radt" / "models" / "emoji-demo" / "clip"))
    source = write_landscapes(tmp_path / "pictures" / "a.tar", with_copies=False)
    assert shell("build", source, "--kb", tmp_path / "kb", "--no-duplicates")[0] == 0
    for number in range(12):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{number}.jpg").write_bytes(saved_again(landscape(number), 70 + number, 85))
        (tmp_path / "train" / f"{number}.txt").write_text(f"landscape {number}")
    out = tmp_path / "n.parquet"
    words = ["neighbors", tmp_path / "train", "--kb", tmp_path / "kb", "--out", out, "-k", 12]
    code, _, err = shell(*words)
    assert code == 0
    assert "built without duplicate groups" in err
    captions = dict(zip(*PairStore(tmp_path / "kb").captions(), strict=True))
    assert len(rows_of(out)) == 12
    for row in rows_of(out):
        assert len(row["neighbor_ids"]) == 11
        assert row["caption"] not in {captions[i] for i in row["neighbor_ids"]}
    assert shell.json(*words, "--query", "image", "--by", "clip", "--include-own")["ungrouped"] == 0
    for row in rows_of(out):
        assert row["caption"] == captions[row["neighbor_ids"][0]], "the original is the nearest there is"
