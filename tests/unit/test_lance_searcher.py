"""Lance's on-disk lists beside exact search."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from index.errors import KnowledgeBaseError
from index.search.lance_searcher import LanceSearcher
from index.search.searcher import (
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
    return folder, ids, vectors, build_searcher("lance", ids, vectors, folder, snapshot=5)


def test_recall_and_scores_beside_exact(built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest]) -> None:
    folder, ids, vectors, manifest = built
    exact, queries = ExactSearcher(ids, vectors), shifted_queries(vectors, seed=77, num=60)
    searcher = open_searcher(folder, store=None)  # type: ignore[arg-type]
    assert (manifest.settings["lists"], searcher.snapshot) == (20, 5)
    assert recall(searcher, exact, queries) >= 0.95
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
    assert build_searcher("lance", ids, vectors, tmp_path / "s").settings["lists"] == 0
    found, scores = open_searcher(tmp_path / "s", store=None).search(vectors[:2], top_k=4)  # type: ignore[arg-type]
    assert found.tolist() == [[9, 4, 7, -1], [4, 7, 9, -1]]
    assert scores[0].tolist() == [1.0, 0.0, 0.0, -np.inf]


def test_a_missing_part_is_one_sentence(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest], tmp_path: Path
) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(KnowledgeBaseError, match="not complete"):
        LanceSearcher.open(tmp_path / "s", built[3])
