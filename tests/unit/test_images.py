"""Reading images by location, whatever they lie in, and what is measured of a decoded one."""

import builtins
import io
import os
from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.errors import ImageError, UserError
from index.images import difference_hash, read_images, readable_image, thumbnail_of, try_read_images
from index.records import ImageLocation, StoredPair, pair_id
from tests.fakes import draw, encode, write_tar

IMAGES = [encode(draw(number)) for number in range(40)]


@pytest.fixture
def tar(tmp_path: Path) -> list[ImageLocation]:
    """A tar of all images, and where each lies in it."""
    import tarfile

    path = tmp_path / "00000.tar"
    write_tar(path, [(f"{i:04d}.png", content) for i, content in enumerate(IMAGES)])
    with tarfile.open(path) as opened:
        return [ImageLocation(uri=str(path), offset=m.offset_data, size=m.size) for m in opened.getmembers()]


def parquet(path: Path, *, row_group_size: int) -> list[ImageLocation]:
    pq.write_table(pa.table({"jpg": IMAGES}), path, row_group_size=row_group_size)
    return [ImageLocation(uri=f"{path}#jpg/{row}") for row in range(len(IMAGES))]


def test_every_kind_of_location_in_one_call_in_any_order(tmp_path: Path, tar: list[ImageLocation]) -> None:
    import lance

    lance.write_dataset(pa.table({"picture": IMAGES}), str(tmp_path / "t.lance"), max_rows_per_file=7)
    (tmp_path / "one.png").write_bytes(IMAGES[5])
    cells = parquet(tmp_path / "t.parquet", row_group_size=6)
    table = [ImageLocation(uri=f"{tmp_path}/t.lance#picture/{row}") for row in range(40)]
    whole = [ImageLocation(uri=str(tmp_path / "one.png"))]
    locations = [*tar, *cells, *table, *whole, *tar[:3]]
    expected = [*IMAGES, *IMAGES, *IMAGES, IMAGES[5], *IMAGES[:3]]
    order = np.random.default_rng(0).permutation(len(locations)).tolist()
    assert read_images([locations[i] for i in order]) == [expected[i] for i in order]
    assert all(location.read() == content for location, content in zip(locations, expected, strict=True))


def test_a_struct_of_bytes_as_hugging_face_writes_it(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": content, "path": None} for content in IMAGES], "a.b": IMAGES[::-1]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=9)
    uris = [f"{tmp_path}/t.parquet#image.bytes/17", f"{tmp_path}/t.parquet#a.b/0"]
    assert read_images([ImageLocation(uri=uri) for uri in uris]) == [IMAGES[17], IMAGES[39]]


def test_a_replaced_table_is_read_as_it_is_now(tmp_path: Path) -> None:
    import lance

    at = parquet(tmp_path / "t.parquet", row_group_size=10)[0]
    row = ImageLocation(uri=f"{tmp_path}/t.lance#jpg/0")
    lance.write_dataset(pa.table({"jpg": IMAGES}), str(tmp_path / "t.lance"))
    assert read_images([at, row]) == [IMAGES[0]] * 2
    pq.write_table(pa.table({"jpg": [b"other"] * 3}), tmp_path / "t.parquet")
    lance.write_dataset(pa.table({"jpg": [b"other"] * 3}), str(tmp_path / "t.lance"), mode="overwrite")
    assert read_images([at, row]) == [b"other"] * 2


def test_copies_in_a_knowledge_base_are_found_by_id(tmp_path: Path) -> None:
    import lance

    ids = [pair_id("d", "s", str(i)) for i in range(40)]
    columns = {"kind": ["pair"] * 39 + ["removed"], "id": ids, "image": pa.array(IMAGES, pa.large_binary())}
    lance.write_dataset(pa.table(columns), str(tmp_path / "pairs.lance"))
    locations = [ImageLocation(uri=f"{tmp_path}/pairs.lance#image/id={i}") for i in ids]
    assert read_images(locations[:39][::-1]) == IMAGES[:39][::-1]
    with pytest.raises(ImageError, match="no bytes in this cell"):
        locations[39].read()


def test_a_file_is_opened_once(monkeypatch: pytest.MonkeyPatch, tar: list[ImageLocation]) -> None:
    opened: list[str] = []
    plain_open = builtins.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return plain_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", counting)
    assert read_images(tar) == IMAGES
    assert opened.count(tar[0].uri) == 1


def test_files_in_a_bucket() -> None:
    fs = fsspec.filesystem("memory")
    offsets = np.cumsum([0, *map(len, IMAGES)]).tolist()
    fs.pipe("/bucket/a.bin", b"".join(IMAGES))
    fs.pipe("/bucket/one.png", IMAGES[7])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"jpg": IMAGES}), buffer, row_group_size=10)
    fs.pipe("/bucket/t.parquet", buffer.getvalue())
    cells = [ImageLocation(uri=f"memory://bucket/t.parquet#jpg/{row}") for row in (39, 0)]
    assert read_images(cells) == [IMAGES[39], IMAGES[0]]
    ranges = [
        ImageLocation(uri="memory://bucket/a.bin", offset=offsets[i], size=len(content))
        for i, content in enumerate(IMAGES)
    ]
    gone = ImageLocation(uri="memory://bucket/gone.png")
    *found, one, missing = try_read_images([*ranges, ImageLocation(uri="memory://bucket/one.png"), gone])
    assert found == IMAGES
    assert one == IMAGES[7]
    assert isinstance(missing, ImageError)
    assert "memory://bucket/gone.png" in str(missing)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1024])


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "only its vector is known"),
        ("{folder}/gone.png", "there is no such file"),
        ("{folder}/gone.parquet#jpg/0", "there is no such file"),
        ("{folder}/gone.lance#jpg/0", "gone.lance"),
        ("{folder}/t.parquet#jpg/40", "no bytes in this cell"),
        ("{folder}/t.parquet#png/0", "t.parquet#png/0"),
        ("{folder}/t.lance#jpg/40", "no bytes in this cell"),
        ("{folder}/broken.parquet#jpg/0", "broken.parquet"),
        ("{folder}", "not a regular file"),
        ("nosuchscheme://bucket/a.png", "nosuchscheme"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_its_place(tmp_path: Path, uri: str, says: str) -> None:
    import lance

    parquet(tmp_path / "t.parquet", row_group_size=10)
    lance.write_dataset(pa.table({"jpg": IMAGES}), str(tmp_path / "t.lance"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    place = uri.format(folder=tmp_path)
    with pytest.raises(ImageError) as raised:
        read_images([ImageLocation(uri=place)])
    assert isinstance(raised.value, UserError)
    assert repr(place) in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_that_is_gone_does_not_take_the_others_along(tar: list[ImageLocation]) -> None:
    _cut(Path(tar[0].uri))
    outcomes = try_read_images(tar)
    good = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
    assert good == IMAGES[: len(good)]
    assert 0 < len(good) < len(IMAGES)
    assert all("has not the size" in str(outcome) for outcome in outcomes[len(good) :])


def test_a_whole_file_of_another_size_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(IMAGES[1])
    assert read_images([ImageLocation(uri=str(path), size=len(IMAGES[1]))]) == [IMAGES[1]]
    for content in (IMAGES[1] + b"more", IMAGES[1][:-1]):
        path.write_bytes(content)
        with pytest.raises(ImageError, match="has not the size"):
            read_images([ImageLocation(uri=str(path), size=len(IMAGES[1]))])


def test_a_changed_tar_is_told_from_the_digests(tar: list[ImageLocation]) -> None:
    write_tar(Path(tar[0].uri), [(f"{i:04d}.png", content) for i, content in enumerate(reversed(IMAGES))])
    digests: Sequence[str | None] = [sha256(content).hexdigest() for content in IMAGES]
    outcomes = try_read_images(tar, digests=digests)
    assert all(isinstance(outcome, ImageError) and "has changed since" in str(outcome) for outcome in outcomes)
    assert isinstance(try_read_images(tar[:1], digests=[None])[0], bytes)  # not known: nothing to compare with


def stored(image: ImageLocation, *, digest: str | None, thumbnail: bytes | None) -> StoredPair:
    return StoredPair(
        id=1,
        dataset="d",
        source="s",
        shard="0.tar",
        digest="",
        key="k",
        caption="a red circle",
        image=image,
        sha256=digest,
        width=32,
        height=32,
        thumbnail=thumbnail,
    )


def test_the_thumbnail_stands_in_for_an_original_that_is_gone_or_changed(tmp_path: Path) -> None:
    path, small = tmp_path / "a.png", thumbnail_of(draw(1), 16)
    path.write_bytes(IMAGES[1])
    pair = stored(ImageLocation(uri=str(path)), digest=sha256(IMAGES[1]).hexdigest(), thumbnail=small)
    assert readable_image(pair) == IMAGES[1]
    path.write_bytes(IMAGES[2])
    assert readable_image(pair) == small
    path.unlink()
    assert readable_image(pair) == small
    with pytest.raises(ImageError, match="there is no such file"):
        readable_image(stored(pair.image, digest=None, thumbnail=None))


@pytest.mark.parametrize("size", [(64, 48), (30, 90), (8, 8)])
def test_thumbnails_keep_the_shape(size: tuple[int, int]) -> None:
    image = PIL.Image.new("RGB", size, "orange")
    small = PIL.Image.open(io.BytesIO(thumbnail_of(image, 16)))
    assert small.format == "JPEG"
    assert max(small.size) == min(16, max(size))
    assert abs(small.width / small.height - size[0] / size[1]) < 0.1
    assert image.size == size  # the picture itself is left alone


def slow_difference_hash(image: PIL.Image.Image) -> int:
    """Means of equal blocks, columns first, as whole numbers; then one comparison after the other."""
    grey = np.asarray(image.convert("L"), np.float64)
    height, width = grey.shape
    columns = np.floor(grey.reshape(height, 9, width // 9).mean(2) + 0.5)
    cells = np.floor(columns.reshape(8, height // 8, 9).mean(1) + 0.5)
    bits = 0
    for row in cells.tolist():
        for left, right in pairwise(row):
            bits = bits << 1 | (left < right)
    return bits - (1 << 64) if bits >> 63 else bits


@pytest.mark.parametrize("seed", range(20))
def test_difference_hash_is_that_of_its_slow_twin(seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    noise = random.integers(0, 3, (32, 36, 3), dtype=np.uint8)
    pixels = np.minimum(blocks.repeat(4, 0).repeat(4, 1), 250) + noise
    image = PIL.Image.fromarray(pixels.astype(np.uint8))
    assert difference_hash(image) == slow_difference_hash(image)


def test_difference_hash_is_a_signed_int64_that_near_duplicates_share() -> None:
    ramp = np.linspace(0, 255, 90).astype(np.uint8)[None, :].repeat(80, 0)
    rising, falling = PIL.Image.fromarray(ramp), PIL.Image.fromarray(ramp[:, ::-1].copy())
    assert difference_hash(rising) == -1  # all 64 bits
    assert difference_hash(falling) == difference_hash(PIL.Image.new("RGB", (50, 50), "red")) == 0
    jpeg = PIL.Image.open(io.BytesIO(thumbnail_of(rising.convert("RGB"), 60)))
    assert difference_hash(jpeg) == difference_hash(rising)


# What a foreign knowledge base may name


def why_unread(location: ImageLocation) -> str:
    (outcome,) = try_read_images([location])
    assert isinstance(outcome, ImageError)
    assert "\n" not in str(outcome)
    return str(outcome)


@pytest.mark.parametrize("cell", ["", "#jpg/0"])
def test_a_pipe_is_not_waited_for_and_a_device_not_read(tmp_path: Path, cell: str) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / ("pipe.parquet" if cell else "pipe.png"), f"file://{tmp_path}/pipe.parquet"):
        assert "it is not a regular file" in why_unread(ImageLocation(uri=f"{path}{cell}"))
    assert "it is not a regular file" in why_unread(ImageLocation(uri="/dev/zero"))
    assert "it is not a regular file" in why_unread(ImageLocation(uri="/dev/zero", offset=0, size=100))


def test_sizes_that_cannot_be_true_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(IMAGES[0])
    for offset, size in ((0, 1 << 40), (0, -1), (-5, 10)):
        assert "no image lies at byte" in why_unread(ImageLocation(uri=str(path), offset=offset, size=size))
    assert "has not the size" in why_unread(ImageLocation(uri=str(path), offset=10, size=10_000))
    fsspec.filesystem("memory").pipe("/bounds/x.png", IMAGES[0])
    monkeypatch.setattr("index.images.MAX_IMAGE_BYTES", len(IMAGES[0]) - 1)
    for uri in (str(path), "memory://bounds/x.png"):
        assert f"larger than {len(IMAGES[0]) - 1} bytes" in why_unread(ImageLocation(uri=uri))


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://evil.example/x.png",
        "ftp://evil.example/x.png",
        "http://evil.example/t.parquet#jpg/0",
        "simplecache::http://evil.example/x.png",
        "s3://bucket/x.zip::http://evil.example/x.png",
        "zip://x.png::file:///etc/x.zip",
        "http://[",
    ],
)
def test_nothing_is_asked_of_hosts_that_no_source_named(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: pytest.fail(f"asked {url}"))
    for origin in ("", "/data", "https://example.org/shards", "http://evil.example.org/"):
        reason = why_unread(ImageLocation(uri=uri, origin=origin))
        assert ("which is not where its source lies" in reason) != ("an address inside another" in reason)


def test_images_are_read_from_the_host_of_their_own_source() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(IMAGES[3])))
            self.end_headers()
            self.wfile.write(IMAGES[3] if self.command == "GET" else b"")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        assert ImageLocation(uri=f"{root}/a/x.png", origin=f"{root}/a").read() == IMAGES[3]
        assert "127.0.0.1" in why_unread(ImageLocation(uri=f"{root}/a/x.png"))
        server.shutdown()


def test_a_row_vouches_for_the_host_of_its_source_only(tmp_path: Path) -> None:
    from index.rows import pair_row, stored_pair

    def image_of(uri: str, source: str) -> ImageLocation:
        pair = StoredPair(
            id=1,
            dataset="d",
            source=source,
            shard="s",
            digest="",
            key="k",
            caption="",
            image=ImageLocation(uri=uri),
            sha256=None,
            width=None,
            height=None,
        )
        return stored_pair({**pair_row(pair), "vector": None}, "https://kb.example/kb").image

    assert image_of("https://example.org/x.png", "https://example.org").origin == "https://example.org"
    assert image_of("pairs.lance#image/id=1", "https://evil.example").origin == "https://kb.example/kb"
