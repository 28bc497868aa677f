"""Lance's on-disk lists beside exact search."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.errors import KnowledgeBaseError
from index.search.lance_searcher import LanceSearcher, lance_settings
from index.search.searcher import (
    ArrayRows,
    ExactSearcher,
    SearcherManifest,
    build_searcher,
    open_searcher,
    recall,
    shifted_queries,
)

ROWS = 5_200  # enough for the lists


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray, SearcherManifest]:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((26, 24))
    vectors = centres[generator.integers(0, 26, ROWS)] + 0.7 * generator.standard_normal((ROWS, 24))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = generator.choice(2**62, size=ROWS, replace=False).astype(np.int64)
    folder = tmp_path_factory.mktemp("lance") / "searcher"
    return folder, ids, vectors, build_searcher("lance", ArrayRows(ids, vectors), folder, snapshot=5)


def test_recall_and_scores_beside_exact(built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest]) -> None:
    folder, ids, vectors, manifest = built
    exact, queries = ExactSearcher(ids, vectors), shifted_queries(vectors, seed=77, num=600)
    searcher = open_searcher(folder, store=None)  # type: ignore[arg-type]
    assert (manifest.settings["lists"], searcher.snapshot) == (20, 5)
    assert manifest.settings["index"] == "IVF_RQ"
    assert manifest.calibrated_on == "shifted rows"
    assert bool(manifest.warning) == (manifest.recall_at_10 < 0.95)  # Lance's k-means has no seed
    # A query whose neighbours lie in a list that is not searched loses many at once, and the calibration asked only a
    # hundred queries: what they said is 0.02 to one side or the other.
    assert manifest.recall_at_10 >= 0.92
    assert recall(searcher, exact, queries) >= 0.88
    found, scores = searcher.search(queries[:5], top_k=10)
    truth = np.stack([exact.scores(query, row) for query, row in zip(queries, found, strict=False)])
    np.testing.assert_allclose(scores, truth, atol=1e-5)  # inner products, not distances
    assert (np.diff(scores, axis=1) <= 0).all()


def test_asking_for_everything_gives_everything_once(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest],
) -> None:
    folder, ids, vectors, manifest = built
    found, _ = LanceSearcher.open(folder, manifest).search(vectors[:1], top_k=ROWS + 2)
    assert np.array_equal(np.sort(found[0, :ROWS]), np.sort(ids))
    assert (found[0, ROWS:] == -1).all()


def test_the_folder_can_be_moved(built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest], tmp_path: Path) -> None:
    folder, _, vectors, manifest = built
    moved = LanceSearcher.open(Path(shutil.copytree(folder, tmp_path / "elsewhere")), manifest)
    here = LanceSearcher.open(folder, manifest)
    assert np.array_equal(moved.search(vectors[:4], top_k=5)[0], here.search(vectors[:4], top_k=5)[0])


def test_small_sets_are_compared_whole(tmp_path: Path) -> None:
    ids, vectors = np.array([9, 4, 7]), np.eye(3, 8, dtype=np.float32)
    assert build_searcher("lance", ArrayRows(ids, vectors), tmp_path / "s").settings["lists"] == 0
    found, scores = open_searcher(tmp_path / "s", store=None).search(vectors[:2], top_k=4)  # type: ignore[arg-type]
    assert found.tolist() == [[9, 4, 7, -1], [4, 7, 9, -1]]
    assert scores[0].tolist() == [1.0, 0.0, 0.0, -np.inf]


def test_a_missing_part_is_one_sentence(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest], tmp_path: Path
) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(KnowledgeBaseError, match="not complete"):
        LanceSearcher.open(tmp_path / "s", built[3])


def test_a_batch_over_threads_has_the_answers_of_single_queries(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest],
) -> None:
    searcher, queries = LanceSearcher.open(built[0], built[3]), shifted_queries(built[2], seed=4, num=12)
    batch = searcher.search(queries, top_k=5)
    alone = [searcher.search(query[None], top_k=5) for query in queries]
    for part in (0, 1):
        assert np.array_equal(batch[part], np.concatenate([answer[part] for answer in alone]))


def test_the_rows_are_never_all_in_memory(tmp_path: Path) -> None:
    class Rows(ArrayRows):
        largest = 0

        def vector_batches(self, rows: int, where: str | None = None) -> Iterator[tuple[Any, Any]]:
            Rows.largest = max(Rows.largest, rows)
            return super().vector_batches(700, where)

    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((2000, 8)).astype(np.float32)
    rows = Rows(generator.permutation(2000), vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    build_searcher("lance", rows, tmp_path / "s")
    opened = open_searcher(tmp_path / "s", store=None)  # type: ignore[arg-type]
    assert opened.ids.tolist() == list(range(2000))
    found, _ = opened.search(rows.vectors[:7], top_k=1)
    assert found[:, 0].tolist() == rows.ids[:7].tolist()
    assert Rows.largest <= 1 << 16


def test_an_odd_width_has_codes_of_bytes() -> None:
    assert lance_settings(10_000, 12)["index"] == "IVF_SQ"
    assert lance_settings(10_000, 16)["index"] == "IVF_RQ"


def test_settings_of_the_first_format_are_read(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest],
) -> None:
    manifest = dataclasses.replace(built[3], settings={"lists": 20, "lists_to_search": 20})
    found, _ = LanceSearcher.open(built[0], manifest).search(built[2][:3], top_k=1)
    assert found[:, 0].tolist() == built[1][:3].tolist()
