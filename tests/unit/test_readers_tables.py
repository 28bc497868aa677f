"""Readers of tables: Parquet with images or paths, clip-retrieval's output, Lance tables."""

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.errors import CorpusError
from index.ingest.readers import Shard, SkippedShard, read
from index.records import BadSample, Pair
from tests.fakes import caption_of, draw, encode


def shards_of(source: Path | str, *, allow_partial: bool = False) -> list[Shard]:
    return [shard for shard in read(str(source), allow_partial=allow_partial) if isinstance(shard, Shard)]


def pairs_of(source: Path | str) -> list[Pair]:
    return [s for shard in shards_of(source) for s in shard.samples() if isinstance(s, Pair)]


def bad_of(source: Path | str, *, allow_partial: bool = False) -> list[tuple[str, str]]:
    shards = shards_of(source, allow_partial=allow_partial)
    return [(s.key, s.reason) for shard in shards for s in shard.samples() if isinstance(s, BadSample)]


def layouts_of(source: Path | str) -> set[str]:
    return {shard.layout for shard in shards_of(source)}


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def damage_column(path: Path, *, group: int, column: int) -> None:
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start + chunk.total_compressed_size - 4] ^= 255
    path.write_bytes(content)


# Parquet


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_img2dataset_parquet(tmp_path: Path, kind: str) -> None:
    encoded = encode(draw(1), {"jpg": "JPEG"}.get(kind, kind.upper()))
    rows = [
        {"caption": "seven", "url": "u7", "key": "000000007", "status": "success", kind: encoded},
        {"caption": "gone", "url": "u1", "key": "000000001", "status": "failed_to_download", kind: None},
        {"caption": "two", "url": "u2", "key": "000000002", "status": "success", kind: encoded},
        {"caption": "lost", "url": "u3", "key": "000000003", "status": "success", kind: None},
        {"caption": "odd", "url": "u4", "key": "000000004", "status": "failed_to_resize", kind: encoded},
    ]
    write_parquet(tmp_path / "00000.parquet", rows)
    (skipped,) = read(str(tmp_path))
    assert isinstance(skipped, SkippedShard)
    assert "00000_stats.json is missing" in skipped.reason
    (tmp_path / "00000_stats.json").write_text("{}")
    pairs = pairs_of(tmp_path)
    assert [(p.key, p.caption, p.metadata["url"]) for p in pairs] == [
        ("000000007", "seven", "u7"),
        ("000000002", "two", "u2"),
    ]
    assert layouts_of(tmp_path) == {"img2dataset parquet"}
    assert kind not in pairs[0].metadata
    assert pairs[1].image.uri == f"{tmp_path}/00000.parquet#{kind}/2"
    assert pairs[1].image.read() == pairs[1].encoded == encoded
    assert bad_of(tmp_path) == [
        ("000000003", "no image"),
        ("000000004", "img2dataset status is 'failed_to_resize'"),
    ]


def test_parquet_of_images_as_hugging_face_has_them(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": encode(draw(1)), "path": None}, "text": "one", "label": 3},
        {"image": {"bytes": None, "path": "b.png"}, "text": "two", "label": 4},
        {"image": {"bytes": None, "path": None}, "text": "none", "label": 5},
        {"image": None, "text": "none", "label": 5},
    ]
    (tmp_path / "b.png").write_bytes(encode(draw(2)))
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    pairs = pairs_of(tmp_path / "train-00000-of-00001.parquet")
    assert [(p.key, p.caption, dict(p.metadata)) for p in pairs] == [
        ("0", "one", {"label": 3}),
        ("1", "two", {"label": 4}),
    ]
    assert [p.image.read() for p in pairs] == [p.encoded for p in pairs] == [encode(draw(1)), encode(draw(2))]
    assert pairs[1].image.uri == str(tmp_path / "b.png")
    assert layouts_of(tmp_path) == {"parquet of images"}


def test_parquet_of_paths(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode(draw(1)))
    (tmp_path / "secret.txt").write_text("secret")
    here = tmp_path / "images" / "a.png"
    paths = [
        "images/a.png", str(here), f"file://{here}", "images/gone.png", "images",
        "https://example.org/a.png", "../../../../dev/zero", "secret.txt", "", "a\0b.png", "x" * 5000 + ".png",
    ]  # fmt: skip
    write_parquet(tmp_path / "captions.parquet", [{"file_name": p, "caption": f"c{i}"} for i, p in enumerate(paths)])
    pairs = pairs_of(tmp_path)
    assert layouts_of(tmp_path) == {"parquet of paths"}  # and not the folder `images`, whose images it describes
    assert [p.key for p in pairs] == ["0", "1", "2"]
    assert all(p.image.read() == p.encoded == encode(draw(1)) for p in pairs)
    bad = dict(bad_of(tmp_path))
    assert sorted(bad, key=int) == [str(i) for i in range(3, len(paths))]
    assert "No such file" in bad["3"]
    assert "https://, and nothing is downloaded" in bad["5"]
    assert "is not the name of an image" in bad["6"]
    assert "is not the name of an image" in bad["7"]


def test_a_folder_of_images_with_a_metadata_parquet(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(draw(i)))
    write_parquet(tmp_path / "metadata.parquet", [{"file_name": f"{i}.png", "text": caption_of(i)} for i in (2, 0, 1)])
    assert [(s.name, s.layout) for s in shards_of(tmp_path)] == [("metadata.parquet", "parquet of paths")]
    assert [(p.encoded, p.caption) for p in pairs_of(tmp_path)] == [(encode(draw(i)), caption_of(i)) for i in (2, 0, 1)]


def test_a_list_of_web_addresses_says_what_to_do(tmp_path: Path) -> None:
    write_parquet(tmp_path / "laion.parquet", [{"URL": "https://example.org/a.jpg", "TEXT": "a"}])
    with pytest.raises(CorpusError, match=r"laion\.parquet lists web addresses.* with img2dataset first"):
        list(read(str(tmp_path)))


def test_a_table_without_images_or_captions_names_what_was_looked_for(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"x": 1, "y": "z"}])
    with pytest.raises(CorpusError, match=r"a\.parquet has no images.* named image, jpg.*columns are x, y"):
        list(read(str(tmp_path)))
    write_parquet(tmp_path / "a.parquet", [{"jpg": b"x", "words": "z"}])
    with pytest.raises(CorpusError, match=r"no text column named caption or text.*columns are jpg, words"):
        list(read(str(tmp_path)))


def test_what_a_parquet_row_may_hold_besides(tmp_path: Path) -> None:
    from datetime import datetime, timezone

    when = datetime(2026, 1, 2, tzinfo=timezone.utc)
    row = {
        "id": 17, "png": encode(draw(1)), "caption": "x", "when": when, "n": float("nan"),
        "tags": ["a", "b"], "mask": b"\x00\xff", "clip_embedding": [0.5, 0.25],
    }  # fmt: skip
    write_parquet(tmp_path / "a.parquet", [row])
    (pair,) = pairs_of(tmp_path)
    assert pair.key == "17"
    assert dict(pair.metadata) == {"id": 17, "when": "2026-01-02 00:00:00+00:00", "n": None, "tags": ["a", "b"]}
    assert json.loads(json.dumps(dict(pair.metadata), allow_nan=False))


def test_a_damaged_row_group_costs_that_group_only(tmp_path: Path) -> None:
    rows = [{"key": f"{i:04d}", "png": encode(draw(i)), "caption": caption_of(i)} for i in range(40)]
    path = tmp_path / "a.parquet"
    write_parquet(path, rows, row_group_size=10, write_page_checksum=True)
    damage_column(path, group=2, column=1)
    assert [p.key for p in pairs_of(path)] == [f"{i:04d}" for i in range(40) if i // 10 != 2]
    ((key, reason),) = bad_of(path)
    assert key == ""
    assert reason.startswith("row group 2 is damaged: rows 20 to 29 are lost")


def test_a_damaged_file_among_others(tmp_path: Path) -> None:
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", [{"png": encode(draw(1)), "caption": name}])
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + b"\x07" * (len(whole) - 8) + b"PAR1")
    assert [p.caption for p in pairs_of(tmp_path)] == ["a", "c"]
    ((key, reason),) = bad_of(tmp_path)
    assert key == ""
    assert reason.startswith("b.parquet is damaged or not a Parquet file")
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    assert [s.name for s in read(str(tmp_path)) if isinstance(s, SkippedShard)] == ["b.parquet"]
    assert len(bad_of(tmp_path, allow_partial=True)) == 1


def test_tables_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"png": encode(draw(i)), "caption": caption_of(i)} for i in range(100)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=100)
    sizes: list[int] = []
    real = pq.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        for batch in real(self, *args, **options):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert [p.caption for p in pairs_of(tmp_path)] == [caption_of(i) for i in range(100)]
    assert max(sizes) <= 64


def test_a_small_file_of_enormous_rows_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.parquet_reader.BATCH_BYTES", 4 << 20)
    image = encode(draw(1)) + np.random.default_rng(0).bytes(900_000)
    write_parquet(tmp_path / "a.parquet", [{"png": image, "caption": "x"}] * 500)
    assert (tmp_path / "a.parquet").stat().st_size < 2_000_000  # 450 MB in all
    before = pa.total_allocated_bytes()
    for count, _ in enumerate(islice(shards_of(tmp_path)[0].samples(), 50)):
        assert pa.total_allocated_bytes() - before < 16 << 20, count


def test_tfrecord_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "00000.tfrecord").write_bytes(b"x")
    write_parquet(tmp_path / "00000.parquet", [{"url": "u", "key": "0", "status": "success", "caption": "x"}])
    with pytest.raises(CorpusError, match=r"TFRecord files are not read; make tars with img2dataset --output_format"):
        list(read(str(tmp_path)))


# clip-retrieval


def write_embeddings(folder: Path, number: str, vectors: np.ndarray, rows: list[dict[str, Any]]) -> None:
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
    write_parquet(folder / "metadata" / f"metadata_{number}.parquet", rows)


def test_clip_retrieval_output(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 8)).astype(np.float16)
    vectors[2], vectors[3, 0] = 0, np.nan
    (tmp_path / "x.png").write_bytes(encode(draw(4)))
    paths = ["000000000", "gone.png", "b", "c", str(tmp_path / "x.png"), "f"]
    rows = [{"image_path": p, "caption": f"c{i}", "url": f"u{i}"} for i, p in enumerate(paths)]
    write_embeddings(tmp_path / "out", "0", vectors[:4], rows[:4])
    write_embeddings(tmp_path / "out", "1", vectors[4:], rows[4:])
    (tmp_path / "out" / "text_emb").mkdir()
    np.save(tmp_path / "out" / "text_emb" / "text_emb_0.npy", vectors)
    pairs = pairs_of(tmp_path / "out")
    assert layouts_of(tmp_path / "out") == {"clip-retrieval"}
    assert [(p.shard, p.key, p.caption) for p in pairs] == [
        ("img_emb/img_emb_0.npy", "0", "c0"),
        ("img_emb/img_emb_0.npy", "1", "c1"),
        ("img_emb/img_emb_1.npy", "0", "c4"),
        ("img_emb/img_emb_1.npy", "1", "c5"),
    ]
    for pair, row in zip(pairs, (0, 1, 4, 5), strict=True):
        expected = vectors[row].astype(np.float64)
        assert pair.vector is not None
        assert pair.vector.dtype == np.float32
        np.testing.assert_allclose(pair.vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert [p.encoded for p in pairs] == [None, None, encode(draw(4)), None]
    assert [p.image.uri for p in pairs] == ["", "", str(tmp_path / "x.png"), ""]
    assert pairs[0].metadata == {"image_path": "000000000", "url": "u0"}
    assert bad_of(tmp_path / "out") == [
        ("2", "the vector is zero or not finite"),
        ("3", "the vector is zero or not finite"),
    ]


def test_vectors_and_captions_of_different_length_are_never_aligned(tmp_path: Path) -> None:
    rows = [{"image_path": str(i), "caption": f"c{i}"} for i in range(5)]
    write_embeddings(tmp_path, "00", np.eye(4, dtype=np.float16), rows)
    write_embeddings(tmp_path, "01", np.eye(5, dtype=np.float16), rows)
    assert len(pairs_of(tmp_path)) == 5
    ((key, reason),) = bad_of(tmp_path)
    assert key == ""
    assert reason.startswith("img_emb_00.npy has 4 vectors and metadata_00.parquet has 5 rows")
    (tmp_path / "metadata" / "metadata_00.parquet").rename(tmp_path / "metadata" / "metadata_02.parquet")
    skipped = {s.name: s.reason for s in read(str(tmp_path)) if isinstance(s, SkippedShard)}
    assert "there is no metadata_00.parquet" in skipped["img_emb/img_emb_00.npy"]
    assert "there is no img_emb_02.npy" in skipped["metadata/metadata_02.parquet"]


def test_a_damaged_row_group_keeps_captions_with_their_vectors(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.eye(30, dtype=np.float16))
    path = tmp_path / "metadata" / "metadata_0.parquet"
    write_parquet(path, [{"caption": f"c{i}"} for i in range(30)], row_group_size=10, write_page_checksum=True)
    damage_column(path, group=1, column=0)
    pairs = pairs_of(tmp_path)
    assert [p.key for p in pairs] == [str(i) for i in range(30) if i // 10 != 1]
    assert all(p.vector is not None and p.caption == f"c{int(np.argmax(p.vector))}" for p in pairs)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 4), np.float16), np.zeros((2, 4), np.int64), np.array([["a"]]), np.asfortranarray(np.eye(2))],
)
def test_an_array_that_is_not_rows_of_floats(tmp_path: Path, array: np.ndarray) -> None:
    write_embeddings(tmp_path, "0", array, [{"caption": "x"}] * 2)
    ((_, reason),) = bad_of(tmp_path)
    assert "where rows of floats were expected" in reason


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    write_embeddings(tmp_path, "0", np.eye(2, dtype=np.float16), [{"caption": "x"}] * 2)
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.array([[{}], [{}]], object), allow_pickle=True)
    ((_, reason),) = bad_of(tmp_path)
    assert "holds object" in reason


# Lance


@pytest.mark.parametrize(
    "failure", ["Generic S3 error: GET http://x/y after 10 retries, max_retries: 10", "Input/output error (os error 5)"]
)
def test_failing_storage_of_a_lance_table_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    write_lance(tmp_path / "t.lance", [{"image": encode(draw(i)), "caption": caption_of(i)} for i in range(3)])
    (shard,) = shards_of(tmp_path)

    def fail(*_: object) -> None:
        raise ValueError(f"LanceError(IO): {failure}")  # Lance's own choice of a type

    monkeypatch.setattr("index.ingest.lance_reader._open", fail)
    with pytest.raises(OSError, match=r"t\.lance: LanceError"):
        list(shard.samples())
    with pytest.raises(OSError, match=r"t\.lance: LanceError"):
        shards_of(tmp_path)


def write_lance(path: Path, rows: list[dict[str, Any]], *, dim: int | None = None, per_fragment: int = 3) -> None:
    import lance

    table = pa.Table.from_pylist(rows)
    if dim is not None:
        at = table.schema.get_field_index("vector")
        table = table.set_column(at, "vector", table.column("vector").cast(pa.list_(pa.float32(), dim)))
    lance.write_dataset(table, str(path), max_rows_per_file=per_fragment, mode="overwrite")


def lance_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"k{i}", "image": encode(draw(i)), "caption": caption_of(i), "vector": [float(i + 1), 1.0], "tag": i}
        for i in range(count)
    ]


def test_a_lance_table(tmp_path: Path) -> None:
    write_lance(tmp_path / "db" / "pets.lance", lance_rows(7), dim=2)
    for source in (tmp_path / "db", tmp_path / "db" / "pets.lance"):
        shards = shards_of(source)
        assert [s.name for s in shards] == ["pets.lance#0", "pets.lance#1", "pets.lance#2"]
        assert {s.dataset for s in shards} == {"db"}
    pairs = pairs_of(tmp_path / "db")
    assert layouts_of(tmp_path / "db") == {"lance table"}
    assert [(p.key, p.caption, p.metadata["tag"]) for p in pairs] == [(f"k{i}", caption_of(i), i) for i in range(7)]
    assert [p.image.read() for p in pairs] == [p.encoded for p in pairs] == [encode(draw(i)) for i in range(7)]
    for i, pair in enumerate(pairs):
        assert pair.vector is not None
        np.testing.assert_allclose(pair.vector, np.array([i + 1, 1]) / np.hypot(i + 1, 1), rtol=1e-6)


def test_rows_deleted_from_a_lance_table(tmp_path: Path) -> None:
    import lance

    write_lance(tmp_path / "t.lance", lance_rows(7))
    before = {s.name: (s.stamp, s.digest()) for s in shards_of(tmp_path)}
    lance.dataset(str(tmp_path / "t.lance")).delete("id IN ('k0', 'k4')")
    after = {s.name: (s.stamp, s.digest()) for s in shards_of(tmp_path)}
    pairs = pairs_of(tmp_path)
    assert [p.key for p in pairs] == ["k1", "k2", "k3", "k5", "k6"]
    assert [p.image.read() for p in pairs] == [p.encoded for p in pairs]
    assert all(before[name][part] != after[name][part] for name in before for part in (0, 1))  # rows have moved up


def test_lance_vectors_alone_and_vectors_that_are_not_there(tmp_path: Path) -> None:
    rows = [{"vector": [3.0, 4.0], "text": "a"}, {"vector": None, "text": "b"}, {"vector": [0.0, 0.0], "text": "c"}]
    write_lance(tmp_path / "t.lance", rows)
    (pair,) = pairs_of(tmp_path)
    assert (pair.caption, pair.encoded, pair.image.uri) == ("a", None, "")
    assert bad_of(tmp_path) == [("1", "no image"), ("2", "the vector is zero or not finite")]
    write_lance(tmp_path / "t.lance", [row | {"image": encode(draw(1))} for row in rows])
    assert [(p.caption, p.vector is None) for p in pairs_of(tmp_path)] == [("a", False), ("b", True)]


def test_a_lance_table_of_blobs(tmp_path: Path) -> None:
    import lance

    field = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    table = pa.table(
        [pa.array([encode(draw(i)) for i in range(3)], pa.large_binary()), pa.array(["a", "b", "c"])],
        schema=pa.schema([field, pa.field("caption", pa.string())]),
    )
    lance.write_dataset(table, str(tmp_path / "t.lance"))
    pairs = pairs_of(tmp_path)
    assert [p.image.read() for p in pairs] == [p.encoded for p in pairs] == [encode(draw(i)) for i in range(3)]


def test_a_lance_table_of_hugging_face_images(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": encode(draw(i)), "path": "x"}, "text": "t"} for i in range(5)]
    write_lance(tmp_path / "t.lance", rows)
    pairs = pairs_of(tmp_path)
    assert [p.image.uri.partition("#")[2] for p in pairs] == [f"image.bytes/{i}" for i in range(5)]
    assert [p.image.read() for p in pairs] == [p.encoded for p in pairs] == [encode(draw(i)) for i in range(5)]


def test_lance_tables_that_are_not_read(tmp_path: Path) -> None:
    write_lance(tmp_path / "a.lance", [{"x": 1}])
    with pytest.raises(CorpusError, match=r"a\.lance has no images"):
        list(read(str(tmp_path)))
    write_lance(tmp_path / "kb" / "pairs.lance", lance_rows(1))
    (tmp_path / "kb" / "kb.json").write_text("{}")
    for source in ("kb", "kb/pairs.lance"):
        with pytest.raises(CorpusError, match="it is a knowledge base"):
            list(read(str(tmp_path / source)))


def test_a_damaged_fragment_costs_that_fragment_only(tmp_path: Path) -> None:
    write_lance(tmp_path / "t.lance", lance_rows(9))
    victim = next(path for path in shards_of(tmp_path)[1].files if path.endswith(".lance"))
    Path(victim).write_bytes(b"\x00" * 100)
    assert [p.key for p in pairs_of(tmp_path)] == ["k0", "k1", "k2", "k6", "k7", "k8"]
    ((key, reason),) = bad_of(tmp_path)
    assert key == ""
    assert reason.startswith("fragment 1 of t.lance cannot be read")


# All


def test_shards_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_lance(tmp_path / "l" / "t.lance", lance_rows(2))
    write_parquet(tmp_path / "p" / "a.parquet", [{"png": encode(draw(1)), "caption": "x"}])
    write_embeddings(tmp_path / "e", "0", np.eye(2, dtype=np.float16), [{"caption": "x"}] * 2)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(encode(draw(1)))
    (tmp_path / "f" / "metadata.csv").write_text("file_name,text\na.png,hello\n")
    shards = shards_of(tmp_path)
    assert len(shards) == 4
    for shard in shards:
        copy = pickle.loads(pickle.dumps(shard))  # noqa: S301 - our own
        assert (copy.stamp, copy.digest()) == (shard.stamp, shard.digest())
        assert [s.key for s in copy.samples()] == [s.key for s in shard.samples()] != []
