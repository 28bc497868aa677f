"""Exact search against argsort, and what a built searcher's folder promises."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from index.errors import ConfigError, DiskError, KnowledgeBaseError
from index.records import ImageLocation, StoredPair
from index.search import searcher as module
from index.search.searcher import (
    ArrayRows,
    CurvePoint,
    ExactSearcher,
    ExactStream,
    SearcherManifest,
    build_searcher,
    is_as_planned,
    open_searcher,
    recall,
    reorder_for,
    shifted_queries,
)
from index.search.sizes import choose_structure
from index.store import PairStore


def rows(num: int, dim: int = 16, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((num, dim)).astype(np.float32)
    ids = generator.choice(2**62, size=num, replace=False).astype(np.int64)
    return ids, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def as_store(ids: np.ndarray, vectors: np.ndarray) -> Any:
    return SimpleNamespace(ids_and_vectors=lambda where=None: (ids, vectors), high_water=0)


def test_exact_equals_argsort() -> None:
    ids, vectors = rows(300)
    queries = shifted_queries(vectors, seed=1, num=20)
    found, scores = ExactSearcher(ids, vectors).search(queries, top_k=7)
    products = queries @ vectors.T
    best = np.argsort(-products, axis=1)[:, :7]
    assert np.array_equal(found, ids[best])
    np.testing.assert_allclose(scores, np.take_along_axis(products, best, axis=1), atol=1e-6)
    assert found.dtype == np.int64
    assert scores.dtype == np.float32


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, vectors = rows(300)
    queries = shifted_queries(vectors, seed=1, num=20)
    exact = ExactSearcher(ids, vectors)
    whole = exact.search(queries, top_k=9)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 700)
    for got, expected in zip(exact.search(queries, top_k=9), whole, strict=True):
        assert np.array_equal(got, expected)


def test_a_query_alone_and_in_a_batch_has_the_same_answer_to_the_bit() -> None:
    ids, vectors = rows(500, 129)
    queries = shifted_queries(vectors, seed=2, num=33)
    exact = ExactSearcher(ids, vectors)
    found, scores = exact.search(queries, top_k=12)
    for position in range(len(queries)):
        alone = exact.search(queries[position : position + 1], top_k=12)
        assert np.array_equal(alone[0][0], found[position])
        assert np.array_equal(alone[1][0], scores[position])


def test_equal_scores_come_in_order_of_id() -> None:
    vectors = np.tile(np.array([[1.0, 0.0], [0.6, 0.8]], dtype=np.float32), (50, 1))
    ids = np.random.default_rng(0).permutation(100)
    found, _ = ExactSearcher(ids, vectors).search(np.array([[1.0, 0.0]], dtype=np.float32), top_k=30)
    assert found[0].tolist() == sorted(ids[::2].tolist())[:30]


def test_short_answers_are_padded() -> None:
    ids, vectors = rows(3)
    found, scores = ExactSearcher(ids, vectors).search(vectors[:2], top_k=5)
    assert (found[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
    assert set(found[0, :3].tolist()) == set(ids.tolist())
    empty = ExactSearcher(ids[:0], vectors[:0])
    assert (empty.search(vectors[:2], top_k=2)[0] == -1).all()


def test_scores_of_named_rows_and_of_strangers() -> None:
    ids, vectors = rows(20)
    scores = ExactSearcher(ids, vectors).scores(vectors[0], np.array([ids[4], 1, ids[0]]))
    np.testing.assert_allclose(scores[[0, 2]], [vectors[0] @ vectors[4], 1.0], atol=1e-6)
    assert scores[1] == -np.inf


def test_a_subset_finds_only_its_rows() -> None:
    ids, vectors = rows(50)
    kept = np.sort(ids[:10])
    found, _ = ExactSearcher(ids, vectors).subset(kept).search(vectors[:5], top_k=10)
    assert all(np.array_equal(np.sort(row), kept) for row in found)


def test_bad_rows_and_queries_are_refused() -> None:
    ids, vectors = rows(5)
    broken = vectors.copy()
    broken[2, 0] = np.nan
    with pytest.raises(KnowledgeBaseError, match=f"id {ids[2]} is not finite"):
        ExactSearcher(ids, broken)
    with pytest.raises(KnowledgeBaseError, match="1 ids appear twice"):
        ExactSearcher(np.array([1, 1]), vectors[:2])
    exact = ExactSearcher(ids, vectors)
    with pytest.raises(KnowledgeBaseError, match="has 4 numbers and the knowledge base 16"):
        exact.search(np.ones((1, 4), dtype=np.float32), top_k=1)
    with pytest.raises(KnowledgeBaseError, match="query vector is not finite"):
        exact.search(broken[2:3], top_k=1)
    with pytest.raises(ConfigError, match="top_k must be at least 1, got 0"):
        exact.search(vectors, top_k=0)


def test_shifted_queries_are_unit_and_are_not_rows() -> None:
    _, vectors = rows(50)
    queries = shifted_queries(vectors, seed=3, num=20)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1.0, atol=1e-5)
    assert (queries @ vectors.T).max() < 0.97
    assert np.array_equal(queries, shifted_queries(vectors, seed=3, num=20))


def test_recall_counts_what_is_found() -> None:
    ids, vectors = rows(40)
    exact = ExactSearcher(ids, vectors)
    half = ExactSearcher(ids[:20], vectors[:20])
    assert recall(exact, exact, vectors, top_k=10) == 1.0
    assert recall(half, exact, vectors, top_k=40) == 0.5


def test_an_exact_searcher_is_built_and_opened(tmp_path: Path) -> None:
    ids, vectors = rows(30)
    manifest = build_searcher("auto", ArrayRows(ids, vectors), tmp_path / "s", snapshot=4, seed=9)
    assert manifest == SearcherManifest.read(tmp_path / "s")
    assert (manifest.kind, manifest.rows, manifest.dim, manifest.recall_at_10) == ("exact", 30, 16, 1.0)
    assert (manifest.snapshot, manifest.seed) == (4, 9)
    assert np.array_equal(open_searcher(tmp_path / "s", as_store(ids, vectors)).ids, np.sort(ids))


def test_without_a_built_searcher_everything_is_compared(tmp_path: Path) -> None:
    opened = open_searcher(tmp_path / "never", as_store(*rows(10)))
    assert isinstance(opened, ExactSearcher)


def test_a_failed_build_leaves_the_old_searcher_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, vectors = rows(30)
    build_searcher("exact", ArrayRows(ids, vectors), tmp_path / "s", snapshot=1)

    def fail(self: Any, directory: Path) -> None:
        (directory / "half").write_text("half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(SearcherManifest, "write", fail)
    with pytest.raises(DiskError, match=r"could not write .*No space left"):
        build_searcher("exact", ArrayRows(ids, vectors), tmp_path / "s", snapshot=2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert SearcherManifest.read(tmp_path / "s").snapshot == 1
    build_searcher("exact", ArrayRows(ids, vectors), tmp_path / "s", snapshot=2)
    assert SearcherManifest.read(tmp_path / "s").snapshot == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_broken_manifest_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "faiss"}))
    with pytest.raises(KnowledgeBaseError, match=r"cannot be read .*faiss.*radt index build"):
        open_searcher(tmp_path, as_store(*rows(3)))


def test_auto_is_exact_while_that_is_quick() -> None:
    assert choose_structure(19_999, 16).kind == "exact"
    assert choose_structure(20_000, 16).kind in ("scann", "lance")


@pytest.mark.usefixtures("untyped_caller")
def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto, exact, scann, lance, got 'faiss'"):
        build_searcher(cast(Any, "faiss"), ArrayRows(*rows(3)), tmp_path / "s")


def twin(ids: np.ndarray, vectors: np.ndarray, queries: np.ndarray, *, block: int, top_k: int) -> None:
    """The stream's answers are those of the searcher in memory, bit by bit."""
    streamed = ExactStream(ArrayRows(ids, vectors), rows_at_once=block).search(queries, top_k=top_k)
    for got, expected in zip(streamed, ExactSearcher(ids, vectors).search(queries, top_k=top_k), strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_a_stream_of_blocks_equals_exact_search_in_memory(block: int) -> None:
    ids, vectors = rows(300)
    twin(ids, vectors, shifted_queries(vectors, seed=4, num=20), block=block, top_k=9)


def test_a_stream_breaks_ties_by_id_across_blocks_and_pads() -> None:
    vectors = np.tile(np.array([[1.0, 0.0], [0.6, 0.8]], dtype=np.float32), (30, 1))
    ids = np.random.default_rng(1).permutation(60)
    twin(ids, vectors, vectors[:2], block=8, top_k=20)
    twin(ids, vectors, vectors[:2], block=8, top_k=70)
    ascending = np.argsort(vectors @ vectors[1])  # every block beats the one before it
    twin(ids[ascending], vectors[ascending], vectors[:2], block=8, top_k=5)


def test_a_stream_keeps_to_the_ids_it_is_given() -> None:
    ids, vectors = rows(300)
    some = np.sort(ids[::3])
    streamed = ExactStream(ArrayRows(ids, vectors), within=some, rows_at_once=64).search(vectors[:5], top_k=150)
    expected = ExactSearcher(ids, vectors).subset(some).search(vectors[:5], top_k=150)
    assert all(map(np.array_equal, streamed, expected))


def test_a_store_and_its_filter_are_streamed(tmp_path: Path) -> None:
    store = filled_store(tmp_path, 50)
    ids, vectors = store.ids_and_vectors()
    found, scores = ExactStream(store).search(vectors[:3], top_k=4)
    expected = ExactSearcher(ids, vectors).search(vectors[:3], top_k=4)
    assert np.array_equal(found, expected[0])
    assert np.array_equal(scores, expected[1])
    chosen, _ = ExactStream(store, "key < '00010'").search(vectors[:3], top_k=50)
    assert {i for i in chosen[0].tolist() if i >= 0} == set(ids[:10].tolist())


def filled_store(folder: Path, num: int) -> PairStore:
    ids, vectors = rows(num)
    store = PairStore.create(folder, dim=16)
    store.add([
        StoredPair(
            id=int(i),
            dataset="d",
            source="s",
            shard="a",
            digest="",
            key=f"{position:05d}",
            caption="c",
            image=ImageLocation(uri=""),
            sha256=None,
            width=None,
            height=None,
            vector=vector,
        )
        for position, (i, vector) in enumerate(zip(ids, vectors, strict=True))
    ])
    return store


def test_rows_are_streamed_in_batches_and_in_order(tmp_path: Path) -> None:
    store = filled_store(tmp_path, 50)
    ids, vectors = store.ids_and_vectors()
    batches = list(store.vector_batches(8))
    assert max(len(some) for some, _ in batches) <= 8
    assert np.array_equal(np.concatenate([some for some, _ in batches]), ids)
    assert np.array_equal(np.concatenate([some for _, some in batches]), vectors)


def test_a_manifest_keeps_its_curve(tmp_path: Path) -> None:
    point = CurvePoint(leaves_to_search=3, reorder=50, recall_at_10=0.9, qps=12.5)
    manifest = SearcherManifest(
        kind="lance", rows=9, dim=2, recall_at_10=0.9, curve=(point,), calibrated_on="captions", warning="w", ram=7
    )
    manifest.write(tmp_path)
    assert SearcherManifest.read(tmp_path) == manifest


def test_what_was_built_before_is_kept_while_it_is_what_is_wanted() -> None:
    manifest = SearcherManifest(kind="scann", rows=30_000, dim=16, recall_at_10=1.0)
    structure = choose_structure(30_000, 16, kind="scann")
    assert is_as_planned(manifest, structure, target_recall=0.95)
    assert not is_as_planned(manifest, structure, target_recall=0.99)
    assert not is_as_planned(manifest, choose_structure(30_000, 16, kind="lance"), target_recall=0.95)
    small = choose_structure(1_000_000, 16, kind="scann", ram=90_000_000)
    assert small.vectors == "disk"
    assert not is_as_planned(manifest, small, target_recall=0.95)


def test_an_impossible_recall_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recall is a share of 1, got 95"):
        build_searcher("auto", ArrayRows(*rows(3)), tmp_path / "s", target_recall=95.0)


def test_of_equal_pictures_any_are_the_true_ones() -> None:
    vectors = np.tile(np.array([[1.0, 0.0], [0.6, 0.8]], dtype=np.float32), (20, 1))
    exact = ExactSearcher(np.arange(40), vectors)
    others = ExactSearcher(np.arange(20, 40), vectors[20:])  # knows ten copies of each, and not those of lowest id
    assert recall(others, exact, vectors[:2], top_k=10) == 1.0
    assert recall(others, exact, vectors[:1], top_k=20) == 0.5


def test_more_answers_need_more_exact_scores() -> None:
    assert [reorder_for(wanted, 50) for wanted in (1, 5, 10, 20, 50, 100)] == [50, 50, 50, 94, 213, 398]
    assert reorder_for(1000, 25) == 2000  # twice as many at least
    assert [reorder_for(100, 50, recall_at=sure) for sure in (5, 10, 50, 100, 900)] == [200, 200, 213, 398, 398]
