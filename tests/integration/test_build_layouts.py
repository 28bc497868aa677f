"""One knowledge base of every layout: what each brings is stored, found, and its image can be read again."""

import json
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.ingest.build import BuildConfig, BuildReport, build
from index.knowledge_base import KnowledgeBase
from tests.fakes import HashEmbedder, caption_of, draw, encode, sample, write_img2dataset, write_tar

PER_LAYOUT = 4


def unit_vector(number: int) -> np.ndarray:
    vector = np.random.default_rng(number).normal(size=HashEmbedder().dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def write_everything(folder: Path) -> None:
    """Four pairs of each layout, numbered through."""
    write_img2dataset(folder / "img2dataset", shards=1, per_shard=4)  # pictures 0 to 3
    write_tar(folder / "tars" / "a.tar", {n: c for i in range(4, 8) for n, c in sample(i).items()})
    (folder / "files").mkdir()
    for i in range(8, 12):
        (folder / "files" / f"{i}.png").write_bytes(encode(draw(i)))
        (folder / "files" / f"{i}.txt").write_text(caption_of(i))
    rows = [{"png": encode(draw(i)), "caption": caption_of(i)} for i in range(12, 16)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "bytes.parquet")
    (folder / "named").mkdir()
    for i in range(16, 20):
        (folder / "named" / f"{i}.png").write_bytes(encode(draw(i)))
    rows = [{"image_path": f"named/{i}.png", "caption": caption_of(i)} for i in range(16, 20)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "paths.parquet")
    for part in ("img_emb", "metadata"):
        (folder / "emb" / part).mkdir(parents=True)
    np.save(folder / "emb" / "img_emb" / "img_emb_0.npy", np.stack([unit_vector(i) for i in range(20, 24)]))
    rows = [{"image_path": f"{i:09d}", "caption": caption_of(i)} for i in range(20, 24)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "emb" / "metadata" / "metadata_0.parquet")
    rows = [
        {"id": str(i), "image": encode(draw(i)), "caption": caption_of(i), "vector": unit_vector(i).tolist()}
        for i in range(24, 28)
    ]
    lance.write_dataset(pa.Table.from_pylist(rows), str(folder / "t.lance"))


def build_at(kb: Path, source: Path) -> BuildReport:
    return build(KnowledgeBase.create(kb, HashEmbedder()), [str(source)], BuildConfig(dataset="all"))


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    (tmp_path / "all").mkdir()
    write_everything(tmp_path / "all")
    return tmp_path / "all"


def test_every_layout_ends_in_one_knowledge_base(everything: Path, tmp_path: Path) -> None:
    report = build_at(tmp_path / "kb", everything)
    assert report.layouts == {
        "img2dataset tars": 1,
        "webdataset tars": 1,
        "image folders": 1,
        "parquet of images": 1,
        "parquet of paths": 1,
        "clip-retrieval": 1,
        "lance table": 1,
    }
    assert (report.pairs_total, report.quarantined) == (7 * PER_LAYOUT, 0)
    assert json.loads(json.dumps(report.to_json()))["layouts"] == report.layouts
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    ids, vectors = kb.store.ids_and_vectors()
    embedder = HashEmbedder()
    for row, vector in zip(kb.store.get(ids), vectors, strict=True):
        number = int(row.caption.rpartition(" ")[2])
        own = unit_vector(number) if number >= 20 else embedder.images([draw(number)])[0]
        np.testing.assert_allclose(vector, own, atol=1e-6)
        if 20 <= number < 24:
            assert (row.image.uri, row.sha256) == ("", None)
        else:
            assert row.image.read() == encode(draw(number))
    assert kb.search("number 22", k=1, by="bm25")[0].caption == caption_of(22)
    assert build_at(tmp_path / "kb", everything).pairs_added == 0


def test_vectors_of_another_width(everything: Path, tmp_path: Path) -> None:
    """They are of another model: what has its image is embedded again, the rest is quarantined."""
    rows = [{"image": encode(draw(1)), "caption": "with", "vector": [1.0, 2.0]}]
    lance.write_dataset(pa.Table.from_pylist(rows), str(tmp_path / "d" / "a.lance"))
    lance.write_dataset(pa.Table.from_pylist([row | {"image": None} for row in rows]), str(tmp_path / "d" / "b.lance"))
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    report = build(kb, [str(tmp_path / "d")], BuildConfig(max_bad_fraction=0.5))
    assert (report.pairs_total, report.quarantined) == (1, 1)
    _, vectors = kb.store.ids_and_vectors()
    np.testing.assert_allclose(vectors[0], HashEmbedder().images([draw(1)])[0], atol=1e-6)
    (bad,) = kb.store.bad_samples()
    assert "2 numbers" in bad.reason


def test_two_lance_tables_of_one_name(everything: Path, tmp_path: Path) -> None:
    from index.errors import CorpusError

    build_at(tmp_path / "kb", everything / "t.lance")
    rows = [{"image": encode(draw(1)), "caption": "x"}]
    lance.write_dataset(pa.Table.from_pylist(rows), str(tmp_path / "other" / "t.lance"))
    with pytest.raises(CorpusError, match=r"'t\.lance#0' of dataset 'all' is in .* --dataset"):
        build_at(tmp_path / "kb", tmp_path / "other")


def test_a_build_that_finds_no_good_sample_quotes_the_first_reason(tmp_path: Path) -> None:
    from index.errors import CorpusError

    for part in ("img_emb", "metadata"):
        (tmp_path / "emb" / part).mkdir(parents=True)
    np.save(tmp_path / "emb" / "img_emb" / "img_emb_0.npy", np.eye(3, dtype=np.float16))
    pq.write_table(pa.table({"caption": ["x"] * 2}), tmp_path / "emb" / "metadata" / "metadata_0.parquet")
    with pytest.raises(CorpusError, match=r"img_emb_0\.npy has 3 vectors and metadata_0\.parquet has 2 rows"):
        build_at(tmp_path / "kb", tmp_path / "emb")
