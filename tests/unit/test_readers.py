"""Readers: the layouts people have, where each image lies, and what is wrong with what cannot be used."""

import csv
import json
from pathlib import Path

import pytest

from index.errors import CorpusError
from index.ingest.folder_reader import ROW_BYTES, _metadata_rows, _Recent
from index.ingest.readers import Shard, SkippedShard, read
from index.records import BadSample, Pair
from tests.fakes import caption_of, draw, encode, sample, write_img2dataset, write_tar


def shards_of(source: Path, **options: bool) -> list[Shard]:
    return [shard for shard in read(str(source), **options) if isinstance(shard, Shard)]


def samples_of(source: Path, **options: bool) -> list[Pair | BadSample]:
    return [sample for shard in shards_of(source, **options) for sample in shard.samples()]


def pairs_of(source: Path) -> list[Pair]:
    return [sample for sample in samples_of(source) if isinstance(sample, Pair)]


def reasons_of(source: Path, **options: bool) -> list[tuple[str, str]]:
    return [(s.key, s.reason) for s in samples_of(source, **options) if isinstance(s, BadSample)]


def test_img2dataset_tars(tmp_path: Path) -> None:
    count = write_img2dataset(tmp_path / "pets", shards=2, per_shard=3)
    pairs = pairs_of(tmp_path / "pets")
    assert [p.caption for p in pairs] == [caption_of(i) for i in range(count)]
    assert {p.dataset for p in pairs} == {"pets"}
    assert pairs[4].shard == "00001.tar"
    assert pairs[4].key == "000000004"
    assert pairs[4].metadata["url"] == "https://example.org/4.png"
    assert "caption" not in pairs[4].metadata


def test_the_location_is_the_byte_range_of_the_image(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=1, per_shard=3)
    for pair in pairs_of(tmp_path):
        assert pair.image.read() == pair.encoded == encode(draw(int(pair.key)))


def test_a_shard_without_stats_is_not_finished(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=3, per_shard=2)
    (tmp_path / "00001_stats.json").unlink()
    found = list(read(str(tmp_path)))
    assert [s.name for s in found] == ["00000.tar", "00001.tar", "00002.tar"]
    assert isinstance(found[1], SkippedShard)
    assert "00001_stats.json is missing" in found[1].reason
    assert len(shards_of(tmp_path, allow_partial=True)) == 3


def test_img2dataset_files_layout(tmp_path: Path) -> None:
    folder = tmp_path / "00000"
    folder.mkdir()
    for name, content in (sample(1) | sample(2)).items():
        (folder / name).write_bytes(content)
    (tmp_path / "00000_stats.json").write_text("{}")
    pairs = pairs_of(tmp_path)
    assert [(p.shard, p.key, p.caption) for p in pairs] == [
        ("00000", "000000001", caption_of(1)),
        ("00000", "000000002", caption_of(2)),
    ]
    assert pairs[0].image.offset is None
    assert pairs[0].image.read() == encode(draw(1))


def test_img2dataset_files_with_their_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, shard in enumerate(("00000", "00001")):
        (tmp_path / shard).mkdir()
        (tmp_path / shard / f"00000000{number}.png").write_bytes(encode(draw(number)))
        rows = [
            {"key": f"00000000{number}", "caption": caption_of(number), "status": "success", "url": f"u{number}"},
            {"key": "000000009", "caption": "gone", "status": "failed_to_download", "url": "u9"},
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{shard}.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = {s.name: s for s in read(str(tmp_path))}
    assert isinstance(found["00001"], SkippedShard)
    assert "00001_stats.json is missing" in found["00001"].reason
    (pair,) = pairs_of(tmp_path)
    assert (pair.shard, pair.key, pair.caption, pair.metadata["url"]) == ("00000", "000000000", caption_of(0), "u0")
    assert len(found) == 2  # the tables are no shards of their own


def test_metadata_comes_from_the_parquet_when_the_tar_has_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = {name: content for name, content in sample(1, key="000000001").items() if name.endswith(".png")}
    write_tar(tmp_path / "00000.tar", members)
    rows = [{"key": "000000001", "caption": "from the table", "status": "success", "url": "u"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    (pair,) = pairs_of(tmp_path)
    assert pair.caption == "from the table"
    assert pair.metadata["url"] == "u"


def test_a_damaged_table_beside_a_tar_is_told_once(tmp_path: Path) -> None:
    members = {name: content for i in range(3) for name, content in sample(i).items() if not name.endswith("json")}
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"nonsense")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert [p.caption for p in pairs_of(tmp_path)] == [caption_of(i) for i in range(3)]
    ((key, reason),) = reasons_of(tmp_path)
    assert key == ""
    assert reason.startswith("00000.parquet is damaged or not a Parquet file")


def test_webdataset_tar_without_stats_is_complete_when_it_ends_well(tmp_path: Path) -> None:
    members = {"a/x.cat.jpg": encode(draw(1), "JPEG"), "a/x.txt": b"one", "b.webp": encode(draw(2), "WEBP")}
    write_tar(tmp_path / "train-0.tar", members | {"b.json": b'{"caption": "two", "n": NaN}'})
    ((key, reason),) = reasons_of(tmp_path)
    assert key == "a/x"  # `x.cat.jpg` has the suffix `cat.jpg`, as in WebDataset
    assert reason.startswith("no image: a key ends at the first dot of a name, which leaves 'cat.jpg'")
    (pair,) = pairs_of(tmp_path)
    assert (pair.key, pair.caption, dict(pair.metadata)) == ("b", "two", {"n": None})


def test_a_cut_tar(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(4):
        members |= sample(i)
    write_tar(tmp_path / "d" / "x.tar", members)
    whole = (tmp_path / "d" / "x.tar").read_bytes()
    image = pairs_of(tmp_path)[3].image
    assert image.offset is not None
    assert image.size is not None
    (tmp_path / "d" / "x.tar").write_bytes(whole[: image.offset + image.size // 2])
    (skipped,) = read(str(tmp_path / "d"))
    assert isinstance(skipped, SkippedShard)
    assert "cut short" in skipped.reason
    assert len([s for s in samples_of(tmp_path / "d", allow_partial=True) if isinstance(s, Pair)]) == 3
    assert reasons_of(tmp_path / "d", allow_partial=True) == [("000000003", "the tar is damaged or cut short here")]


@pytest.mark.parametrize("cut", range(0, 9000, 257))
def test_a_tar_cut_anywhere_gives_whole_pairs_and_one_complaint(tmp_path: Path, cut: int) -> None:
    write_img2dataset(tmp_path, shards=1, per_shard=3)
    path = tmp_path / "00000.tar"
    content = {p.key: p.encoded for p in pairs_of(tmp_path)}
    path.write_bytes(path.read_bytes()[:cut])
    samples = samples_of(tmp_path)
    kept = [s for s in samples if isinstance(s, Pair)]
    assert all(p.encoded == content[p.key] for p in kept)
    has_end = cut > 3 * 3 * 1024 + 512
    assert len(samples) - len(kept) == (0 if has_end else 1)


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=1, per_shard=4)
    path = tmp_path / "00000.tar"
    offset = pairs_of(tmp_path)[2].image.offset
    assert offset is not None
    content = bytearray(path.read_bytes())
    content[offset - 512 : offset] = b"\xff" * 512
    path.write_bytes(content)
    assert [p.key for p in pairs_of(tmp_path)] == ["000000000", "000000001", "000000003"]
    assert reasons_of(tmp_path) == [("", "the tar is damaged or cut short here"), ("000000002", "no image")]


def test_what_is_wrong_with_a_sample_is_said(tmp_path: Path) -> None:
    good = sample(1, key="good")
    members = [
        *good.items(),
        ("empty.png", encode(draw(2))),
        ("empty.txt", b"  \n"),
        ("bare.png", encode(draw(3))),
        ("words.txt", b"no picture"),
        ("latin.png", encode(draw(4))),
        ("latin.txt", "caf\u00e9".encode("latin-1")),
        ("json.png", encode(draw(5))),
        ("json.json", b"{"),
        ("failed.png", encode(draw(6))),
        ("failed.json", b'{"caption": "x", "status": "failed_to_resize"}'),
        *good.items(),
    ]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")
    assert reasons_of(tmp_path) == [
        ("empty", "no caption"),
        ("bare", "no caption"),
        ("words", "no image"),
        ("latin", "the caption is not UTF-8"),
        ("json", "the json beside the image cannot be read"),
        ("failed", "img2dataset status is 'failed_to_resize'"),
        ("good", "duplicate key"),
    ]
    assert [p.key for p in pairs_of(tmp_path)] == ["good"]


def test_folders_with_captions_beside_and_above(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "dogs").mkdir()
    (tmp_path / "cats" / "tom.png").write_bytes(encode(draw(1)))
    (tmp_path / "cats" / "tom.txt").write_text("tom  the\ncat\n")
    (tmp_path / "cats" / "tom.jpg").write_bytes(encode(draw(2), "JPEG"))
    (tmp_path / "dogs" / "rex.png").write_bytes(encode(draw(3)))
    (tmp_path / "dogs" / "nameless.png").write_bytes(encode(draw(4)))
    lines = [{"file_name": "dogs/rex.png", "text": "rex the dog", "age": 3}, {"file_name": "gone.png", "text": "x"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = pairs_of(tmp_path)
    assert [(p.shard, p.key, p.caption) for p in pairs] == [
        ("cats", "tom.jpg", "tom the cat"),
        ("cats", "tom.png", "tom the cat"),
        ("dogs", "rex.png", "rex the dog"),
    ]
    assert pairs[2].metadata["age"] == 3
    assert reasons_of(tmp_path) == [("nameless.png", "no caption")]


def test_folder_with_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(draw(1)))
    (tmp_path / "metadata.csv").write_text('file_name,caption,license\na.png,"red, round",CC0\n')
    (pair,) = pairs_of(tmp_path)
    assert (pair.caption, pair.shard, dict(pair.metadata)) == ("red, round", ".", {"license": "CC0"})


@pytest.mark.parametrize(
    ("name", "content"),
    [("metadata.jsonl", '{"text": "x"}'), ("metadata.jsonl", "nonsense"), ("metadata.csv", "a,b\n1,2")],
)
def test_a_metadata_file_that_names_no_images(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "a.png").write_bytes(encode(draw(1)))
    (tmp_path / name).write_text(content)
    (whole, own) = reasons_of(tmp_path)
    assert whole[0] == ""
    assert "file_name" in whole[1]
    assert own == ("a.png", "no caption")


def test_a_tar_alone_is_the_shard_it_is_among_others(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "pets", shards=2, per_shard=1)
    (alone,) = shards_of(tmp_path / "pets" / "00001.tar")
    among = shards_of(tmp_path / "pets")[1]
    assert (alone.dataset, alone.source, alone.name) == (among.dataset, among.source, among.name)
    assert (alone.stamp, alone.digest()) == (among.stamp, among.digest())


def test_stamp_and_digest_tell_a_changed_shard(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=1, per_shard=1)
    before = shards_of(tmp_path)[0]
    stamp, digest = before.stamp, before.digest()
    (tmp_path / "00000.tar").touch()
    touched = shards_of(tmp_path)[0]
    assert touched.stamp != stamp
    assert touched.digest() == digest
    write_tar(tmp_path / "00000.tar", sample(7))
    assert shards_of(tmp_path)[0].digest() != digest


def test_a_changed_metadata_file_changes_the_folders_below_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encode(draw(1)))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a/x.png", "text": "one"}')
    digest = shards_of(tmp_path)[0].digest()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a/x.png", "text": "two"}')
    assert shards_of(tmp_path)[0].digest() != digest


def test_nothing_is_written_into_the_source(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=1, per_shard=2)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    samples_of(tmp_path)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before


def test_unfinished_and_hidden_files_are_nobodys_data(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, shards=1, per_shard=1)
    write_tar(tmp_path / "_tmp" / "1.tar", sample(1))
    write_tar(tmp_path / ".cache" / "1.tar", sample(1))
    assert [s.name for s in shards_of(tmp_path)] == ["00000.tar"]


def test_sources_that_are_not_there_or_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there is nothing at"):
        list(read(str(tmp_path / "gone")))
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(CorpusError, match="no image-text pairs"):
        list(read(str(tmp_path)))
    with pytest.raises(CorpusError, match="no image-text pairs"):
        list(read(str(tmp_path / "notes.md")))


def test_a_bucket_reads_as_a_folder_does(tmp_path: Path) -> None:
    import fsspec

    write_img2dataset(tmp_path / "pets", shards=1, per_shard=2)
    fs = fsspec.filesystem("memory")
    try:
        for path in (tmp_path / "pets").iterdir():
            fs.pipe(f"/bucket/pets/{path.name}", path.read_bytes())
        shards = [s for s in read("memory://bucket/pets") if isinstance(s, Shard)]
        pairs = [p for s in shards for p in s.samples() if isinstance(p, Pair)]
        assert [p.id for p in pairs] == [p.id for p in pairs_of(tmp_path / "pets")]
        assert pairs[1].image.uri == "memory:///bucket/pets/00000.tar"
        assert pairs[1].image.read() == encode(draw(1))
    finally:
        fs.rm("/bucket", recursive=True)


def test_a_kind_of_source_that_is_not_known() -> None:
    with pytest.raises(CorpusError, match="cannot be opened"):
        list(read("nosuch://bucket/pets"))


def test_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    import os

    members = [
        ("half.png", encode(draw(1))),
        ("half.json", b'{"caption": "a \\ud83d cat", "emoji": "\\ud83d\\ude00", "deep": {"x": "\\uDC00"}}'),
        ("deep.png", encode(draw(2))),
        ("deep.json", b"[" * 100_000),
        (os.fsdecode(b"caf\xe9.png"), encode(draw(3))),
        (os.fsdecode(b"caf\xe9.txt"), b"a cafe"),
    ]
    write_tar(tmp_path / "a.tar", members)
    (pair,) = pairs_of(tmp_path)
    assert pair.caption == "a ? cat"
    assert dict(pair.metadata) == {"emoji": "\U0001f600", "deep": {"x": "?"}}
    assert reasons_of(tmp_path) == [
        ("deep", "the json beside the image cannot be read"),
        ("caf\\udce9", "the file name is not UTF-8"),
    ]


def test_an_image_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    import os

    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encode(draw(1)))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a cafe")
    assert reasons_of(tmp_path) == [("caf\\udce9.png", "the file name is not UTF-8")]
    assert shards_of(tmp_path)[0].digest() == shards_of(tmp_path)[0].digest()


def test_a_shard_whose_name_is_not_utf8(tmp_path: Path) -> None:
    import os

    write_tar(tmp_path / os.fsdecode(b"caf\xe9.tar"), sample(1))
    with pytest.raises(CorpusError, match=r"caf.*is not UTF-8; rename it"):
        list(read(str(tmp_path)))


# Long metadata files


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_metadata_file_takes_about_its_own_size_in_memory(tmp_path: Path, name: str) -> None:
    import tracemalloc

    from fsspec.implementations.local import LocalFileSystem

    rows = [{"file_name": f"{i:06d}.png", "text": f"caption \u2028 {i} " + "long " * 60} for i in range(8000)]
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    tracemalloc.start()
    found = _metadata_rows(LocalFileSystem(), str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not isinstance(found, CorpusError)
    assert len(found) == len(rows)
    assert peak < 2 * path.stat().st_size + (4 << 20)


def test_metadata_files_are_held_as_far_as_they_fit_together() -> None:
    recent, read = _Recent(3 * (ROW_BYTES + 10)), []

    def get(name: str, rows: int = 1) -> None:
        def first() -> dict[str, bytes]:
            read.append(name)
            return {f"{number:05d}": b"12345" for number in range(rows)}

        assert len(recent.get(name, first)) == rows

    for name in "abcabca":
        get(name)
    assert "".join(read) == "abc"
    get("d")  # in place of b, the one that was asked for longest ago
    for name in "acd":
        get(name)
    assert "".join(read) == "abcd"
    get("large", rows=50)  # by itself
    get("large", rows=50)
    get("d")
    assert read == [*"abcd", "large", "d"]


def test_a_metadata_file_that_memory_cannot_hold_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encode(draw(1)))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "' + "x" * 5000 + '"}\n' * 2)
    monkeypatch.setattr("index.ingest.folder_reader.MAX_METADATA_BYTES", 4000)
    (shard,) = read(str(tmp_path))
    reasons = [sample.reason for sample in shard.samples() if isinstance(sample, BadSample)]
    assert "metadata.jsonl is larger than 0 MiB, too much to be held in memory" in reasons[0]


def test_a_line_that_is_too_long_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.folder_reader.MAX_TEXT_BYTES", 100)
    (tmp_path / "a.png").write_bytes(encode(draw(1)))
    long = '{"file_name": "b.png", "text": "' + "x" * 1000 + '"}\n'
    (tmp_path / "metadata.jsonl").write_text(long + '{"file_name": "a.png", "text": "one"}\n')
    (shard,) = read(str(tmp_path))
    assert [sample.caption for sample in shard.samples() if isinstance(sample, Pair)] == ["one"]
