"""What a source may be: a folder, a file, a pattern; on this machine, in a bucket, on a web server."""

import http.server
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.errors import CorpusError, ImageError
from index.ingest.build import BuildConfig, build
from index.ingest.readers import Shard, SkippedShard, check_source, read
from index.ingest.sources import expand_braces
from index.knowledge_base import KnowledgeBase
from index.records import Pair
from radt.neighbors import neighbors_of
from tests.fakes import HashEmbedder, caption_of, draw, encode, sample, write_img2dataset, write_tar


def shards_of(source: Path | str) -> list[Shard]:
    return [shard for shard in read(str(source)) if isinstance(shard, Shard)]


def names_of(source: Path | str) -> list[str]:
    return [shard.name for shard in shards_of(source)]


def pairs_of(source: Path | str) -> list[Pair]:
    return [s for shard in shards_of(source) for s in shard.samples() if isinstance(s, Pair)]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a", ["a"]),
        ("{0..2}", ["0", "1", "2"]),
        ("x{08..11}.tar", ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a,}", ["a", ""]),
    ],
)
def test_braces(pattern: str, paths: list[str]) -> None:
    assert expand_braces(pattern) == paths


def test_braces_without_bounds() -> None:
    for pattern in ("{0..99999999999}.tar", "{0..9999}{0..9999}"):
        with pytest.raises(CorpusError, match="names more than"):
            expand_braces(pattern)


def test_patterns_name_the_same_shards_as_their_folder(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "pets", shards=4, per_shard=1)
    (tmp_path / "pets" / "00003_stats.json").unlink()
    whole = {s.name: s for s in shards_of(tmp_path / "pets")}
    for pattern, expected in {
        "{00000..00001}.tar": ["00000.tar", "00001.tar"],
        "0000[12].tar": ["00001.tar", "00002.tar"],
    }.items():
        found = shards_of(tmp_path / "pets" / pattern)
        assert [s.name for s in found] == expected
        for shard in found:
            assert (shard.dataset, shard.source, shard.stamp) == (
                "pets",
                str(tmp_path / "pets"),
                whole[shard.name].stamp,
            )
    skipped = [s.name for s in read(str(tmp_path / "pets" / "*.tar")) if isinstance(s, SkippedShard)]
    assert skipped == ["00003.tar"]


def test_patterns_over_folders(tmp_path: Path) -> None:
    for folder in ("a", "b", "c/d"):
        write_tar(tmp_path / folder / "x.tar", sample(1))
    assert names_of(tmp_path / "*" / "x.tar") == ["a/x.tar", "b/x.tar"]
    assert names_of(tmp_path / "{b,c}" / "**" / "*.tar") == ["b/x.tar", "c/d/x.tar"]


def test_patterns_of_lance_tables(tmp_path: Path) -> None:
    import lance

    for name in "ab":
        lance.write_dataset(pa.table({"image": [encode(draw(1))], "text": ["x"]}), str(tmp_path / f"{name}.lance"))
    assert names_of(tmp_path / "*.lance") == ["a.lance#0", "b.lance#0"]
    assert names_of(tmp_path / "{b,c}.lance") == ["b.lance#0"]


def test_what_a_pattern_names_and_is_not_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample(1))
    found = list(read(str(tmp_path / "{0..2}.tar")))
    assert [(s.name, isinstance(s, Shard)) for s in found] == [("0.tar", True), ("1.tar", False), ("2.tar", False)]
    for pattern in ("{7..8}.tar", "x*.tar"):
        with pytest.raises(CorpusError):
            list(read(str(tmp_path / pattern)))
    with pytest.raises(CorpusError, match="there is no folder"):
        check_source(str(tmp_path / "gone" / "*.tar"))


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    write_tar(tmp_path / "{0..1}" / "a[1].tar", sample(1))
    assert names_of(tmp_path / "{0..1}") == ["a[1].tar"]
    assert names_of(tmp_path / "{0..1}" / "a[1].tar") == ["a[1].tar"]
    write_tar(tmp_path / "[2026]" / "a.tar", sample(1))
    write_tar(tmp_path / "2" / "a.tar", sample(1))
    assert [(s.name, s.dataset) for s in shards_of(tmp_path / "[2026]" / "a.tar")] == [("a.tar", "[2026]")]


def test_links_are_followed_and_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    write_tar(tmp_path / "far" / "x.tar", sample(1))
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "a.tar").symlink_to(tmp_path / "far" / "x.tar")
    (tmp_path / "near" / "b.tar").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "near" / "c.tar")
    (shard,) = shards_of(tmp_path / "near")
    assert (shard.name, shard.bytes) == ("a.tar", (tmp_path / "far" / "x.tar").stat().st_size)
    os.utime(tmp_path / "far" / "x.tar", (1, 1))
    assert shards_of(tmp_path / "near")[0].stamp != shard.stamp


def test_compressed_tars_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"a\.tar\.gz: an image cannot be read at its place in a compressed tar"):
        list(read(str(tmp_path)))
    write_tar(tmp_path / "b.tar", sample(1))
    assert [type(s).__name__ for s in read(str(tmp_path))] == ["SkippedShard", "Shard"]


@pytest.mark.parametrize(
    ("layout", "prepare"),
    [
        ("img2dataset tars", lambda d: write_img2dataset(d, shards=1, per_shard=1)),
        ("webdataset tars", lambda d: write_tar(d / "a.tar", sample(1))),
        ("image folders", lambda d: [(d / n).write_bytes(c) for n, c in sample(1).items()]),
        ("parquet of images", lambda d: pq.write_table(pa.table({"png": [b"x"], "text": ["x"]}), d / "a.parquet")),
        ("parquet of paths", lambda d: pq.write_table(pa.table({"path": ["x"], "text": ["x"]}), d / "a.parquet")),
    ],
)
def test_the_layout_is_named(tmp_path: Path, layout: str, prepare: Any) -> None:
    (tmp_path / "d").mkdir()
    prepare(tmp_path / "d")
    (shard,) = shards_of(tmp_path / "d")
    assert shard.layout == layout


def test_layouts_side_by_side(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "a", shards=1, per_shard=1)
    write_tar(tmp_path / "b" / "x.tar", sample(2))
    (tmp_path / "c").mkdir()
    for name, content in sample(3).items():
        (tmp_path / "c" / name).write_bytes(content)
    pq.write_table(pa.table({"png": [encode(draw(4))], "text": ["four"]}), tmp_path / "d.parquet")
    found = {s.name: s.layout for s in shards_of(tmp_path)}
    assert found == {
        "a/00000.tar": "img2dataset tars",
        "b/x.tar": "webdataset tars",
        "c": "image folders",
        "d.parquet": "parquet of images",
    }
    assert len(pairs_of(tmp_path)) == 4


# Buckets


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """An S3 service on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, `s3://pets`, that is reached by the usual environment variables."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")  # for Lance, which has a client of its own
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir("pets")
    yield fs
    fs.rm("pets", recursive=True)


def put(fs: Any, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


def count_requests(fs: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that are made of the service from now on."""
    calls: list[str] = []
    real = type(fs)._call_s3

    async def counted(self: Any, method: str, *args: Any, **options: Any) -> Any:
        calls.append(method)
        return await real(self, method, *args, **options)

    monkeypatch.setattr(type(fs), "_call_s3", counted)
    return calls


def test_a_bucket_of_tars(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_img2dataset(tmp_path / "d", shards=2, per_shard=200)
    put(bucket, tmp_path / "d", "pets/d")
    calls = count_requests(bucket, monkeypatch)
    shards = shards_of("s3://pets/d")
    pairs = [s for shard in shards for s in shard.samples() if isinstance(s, Pair)]
    assert len(pairs) == 400
    assert len(calls) <= 10  # a tar is read in large pieces, not member by member
    local = pairs_of(tmp_path / "d")
    assert [(p.id, p.encoded) for p in pairs] == [(p.id, p.encoded) for p in local]
    assert pairs[7].image.uri == "s3://pets/d/00000.tar"
    assert pairs[7].image.read() == local[7].encoded
    assert [s.name for s in shards_of("s3://pets/d/{00001..00001}.tar")] == ["00001.tar"]
    assert [s.name for s in shards_of("s3://pets/d/*1.tar")] == ["00001.tar"]


def test_a_large_tar_in_a_bucket_is_read_ahead(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.shards.READ_AHEAD", 1 << 20)
    noise = np.random.default_rng(0)
    members = {name: c for i in range(60) for name, c in ((f"{i}.png", noise.bytes(100_000)), (f"{i}.txt", b"x"))}
    write_tar(tmp_path / "a.tar", members)
    bucket.pipe("pets/a.tar", (tmp_path / "a.tar").read_bytes())
    (shard,) = shards_of("s3://pets")
    calls = count_requests(bucket, monkeypatch)
    assert [p.encoded for p in shard.samples() if isinstance(p, Pair)] == [
        c for n, c in members.items() if n.endswith("png")
    ]
    assert len(calls) <= 9  # 6 MB in pieces of 1 MB


def test_a_changed_object_is_noticed_by_its_etag_without_being_read(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", sample(1))
    bucket.pipe("pets/a.tar", (tmp_path / "a.tar").read_bytes())
    before = shards_of("s3://pets")[0]
    write_tar(tmp_path / "a.tar", sample(2))
    bucket.pipe("pets/a.tar", (tmp_path / "a.tar").read_bytes())  # the same size, within the same second
    after = shards_of("s3://pets")[0]
    assert before.stamp != after.stamp
    calls = count_requests(bucket, monkeypatch)
    assert before.digest() != after.digest()
    assert calls == []


def test_a_build_from_a_bucket(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_from_bucket() -> tuple[int, int]:
        kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
        report = build(kb, ["s3://pets/d"], BuildConfig())
        return report.pairs_added, report.shards_unchanged

    write_img2dataset(tmp_path / "d", shards=3, per_shard=4)
    put(bucket, tmp_path / "d", "pets/d")
    assert build_from_bucket() == (12, 0)
    calls = count_requests(bucket, monkeypatch)
    assert build_from_bucket() == (0, 3)
    assert "get_object" not in calls
    write_tar(tmp_path / "d" / "00001.tar", sample(77))
    bucket.pipe("pets/d/00001.tar", (tmp_path / "d" / "00001.tar").read_bytes())
    assert build_from_bucket() == (1, 2)
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    for row in kb.store.get(kb.store.matching_ids()):
        assert row.image.uri.startswith("s3://pets/d/")
        assert row.image.read() == encode(draw(int(row.key)))


def test_other_layouts_in_a_bucket(tmp_path: Path, bucket: Any) -> None:
    import lance

    d = tmp_path / "d"
    (d / "folder").mkdir(parents=True)
    for i in range(5):
        (d / "folder" / f"{i}.png").write_bytes(encode(draw(i)))
        (d / "folder" / f"{i}.txt").write_text(f"folder {i}")
    pq.write_table(pa.table({"png": [encode(draw(i)) for i in range(5)], "text": ["p"] * 5}), d / "a.parquet")
    paths = ["folder/0.png", "s3://pets/d/folder/1.png", "folder/gone.png"]
    pq.write_table(pa.table({"image_path": paths, "text": ["q"] * 3}), d / "b.parquet")
    (d / "emb" / "img_emb").mkdir(parents=True)
    (d / "emb" / "metadata").mkdir()
    np.save(d / "emb" / "img_emb" / "img_emb_0.npy", np.eye(3, dtype=np.float16))
    pq.write_table(pa.table({"caption": ["e"] * 3}), d / "emb" / "metadata" / "metadata_0.parquet")
    lance.write_dataset(pa.table({"image": [encode(draw(i)) for i in range(3)], "text": ["l"] * 3}), str(d / "t.lance"))
    put(bucket, d, "pets/d")
    found = {shard.name: list(shard.samples()) for shard in shards_of("s3://pets/d")}
    local = {shard.name: list(shard.samples()) for shard in shards_of(d)}
    counts = {name: sum(isinstance(s, Pair) for s in samples) for name, samples in found.items()}
    assert counts == {"folder": 5, "a.parquet": 5, "b.parquet": 2, "emb/img_emb/img_emb_0.npy": 3, "t.lance#0": 3}
    for name in set(found) - {"b.parquet"}:
        assert [s.key for s in found[name]] == [s.key for s in local[name]]
    for samples in found.values():
        for pair in samples:
            if isinstance(pair, Pair) and pair.encoded is not None:
                assert pair.image.read() == pair.encoded


def test_empty_objects(bucket: Any) -> None:
    for name, content in {"a.png": encode(draw(1)), "a.txt": b"", "b.png": b"", "b.txt": b"words"}.items():
        bucket.pipe(f"pets/d/{name}", content)
    (shard,) = shards_of("s3://pets/d")
    assert [(s.key, getattr(s, "reason", "")) for s in shard.samples()] == [("a.png", "no caption"), ("b.png", "")]


def test_what_a_storage_client_raises_is_a_failure_to_read_and_no_property_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aiohttp

    write_img2dataset(tmp_path, shards=1, per_shard=3)
    (shard,) = shards_of(tmp_path)

    def broken(*args: Any) -> None:
        raise aiohttp.ServerDisconnectedError

    monkeypatch.setattr("index.ingest.tar_reader.open_ahead", broken)
    with pytest.raises(OSError, match="Server disconnected"):
        list(shard.samples())


def test_a_bucket_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CorpusError, match=r"'s3://pets/x' cannot be reached \(.+\); check the address"):
        check_source("s3://pets/x")


def test_a_bucket_that_is_not_there(bucket: Any) -> None:
    with pytest.raises(CorpusError, match="there is nothing at 's3://pets/gone'"):
        list(read("s3://pets/gone"))


# Web servers


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Python's own server, with the ranges that every other one has."""

    gives_ranges = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file() or "Range" not in self.headers or not self.gives_ranges:
            super().do_GET()
            return
        content = path.read_bytes()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server of the folder `d`."""
    handler = lambda *args: RangeHandler(*args, directory=str(tmp_path / "d"))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tars_on_a_web_server(tmp_path: Path, web: str) -> None:
    write_img2dataset(tmp_path / "d" / "pets", shards=2, per_shard=3)
    local = [p.encoded for p in pairs_of(tmp_path / "d" / "pets")]
    for source in (f"{web}/pets/{{00000..00001}}.tar", f"{web}/pets"):
        shards = shards_of(source)
        assert [(s.name, s.dataset, s.layout) for s in shards] == [
            ("00000.tar", "pets", "img2dataset tars"),
            ("00001.tar", "pets", "img2dataset tars"),
        ]
        pairs = [s for shard in shards for s in shard.samples() if isinstance(s, Pair)]
        assert [p.encoded for p in pairs] == local
        assert replace(pairs[4].image, origin=source).read() == local[4]  # as a row of the knowledge base has it
    with pytest.raises(CorpusError, match=r"cannot be listed; name the files with"):
        list(read(f"{web}/pets/*.tar"))


def test_hits_from_a_web_server_can_be_read(tmp_path: Path, web: str) -> None:
    """Also by the generator; and where the row's source does not vouch for the host, nothing is asked of it."""
    write_img2dataset(tmp_path / "d" / "pets", shards=2, per_shard=3)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    build(kb, [f"{web}/pets/{{00000..00001}}.tar"], BuildConfig())
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    hits = kb.search(caption_of(4), k=6, by="hybrid")
    encoded = {pair.caption: pair.encoded for pair in pairs_of(tmp_path / "d" / "pets")}
    assert [hit.image.read() for hit in hits] == [encoded[hit.caption] for hit in hits]
    for hit, picture in zip(hits, neighbors_of(hits, [], (32, 32)), strict=True):
        assert np.array_equal(np.asarray(picture.original), np.asarray(hit.open_image()))
    (row,) = kb.store.get([hits[0].id], vectors=True)
    kb.store.add([replace(row, source=str(tmp_path))])
    with pytest.raises(ImageError, match="which is not where its source lies"):
        kb.search(row.caption, k=1, by="clip")[0].image.read()


def test_a_web_server_without_ranges(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_img2dataset(tmp_path / "d" / "pets", shards=1, per_shard=3)
    monkeypatch.setattr(RangeHandler, "gives_ranges", False)
    for source in (f"{web}/pets", f"{web}/pets/00000.tar"):
        with pytest.raises(CorpusError, match="gives files only as a whole; download them"):
            list(read(source))
