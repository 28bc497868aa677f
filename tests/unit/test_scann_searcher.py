"""ScaNN beside exact search, saved, moved, opened, and never trusted with a pickle."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.errors import KnowledgeBaseError, MissingExtraError
from index.search import scann_searcher as module
from index.search.scann_searcher import ScannSearcher, import_scann, scann_settings
from index.search.searcher import (
    EXACT_BELOW,
    ExactSearcher,
    SearcherManifest,
    build_searcher,
    choose_kind,
    open_searcher,
    recall,
    shifted_queries,
)

pytest.importorskip("scann", reason="ScaNN has wheels for Linux only")


def clusters(num: int, dim: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((max(1, num // 200), dim))
    vectors = centres[generator.integers(0, len(centres), num)] + 0.7 * generator.standard_normal((num, dim))
    ids = np.sort(generator.choice(2**62, size=num, replace=False)).astype(np.int64)
    return ids, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray, SearcherManifest]:
    """A searcher large enough for the tree and the quantisation."""
    ids, vectors = clusters(EXACT_BELOW, 32)
    folder = tmp_path_factory.mktemp("scann") / "searcher"
    return folder, ids, vectors, build_searcher("scann", ids, vectors, folder, snapshot=3)


def test_recall_beside_exact_with_queries_it_has_not_seen(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest],
) -> None:
    folder, ids, vectors, manifest = built
    exact, queries = ExactSearcher(ids, vectors), shifted_queries(vectors, seed=77, num=100)
    searcher = ScannSearcher.open(folder, manifest)
    assert manifest.settings["leaves"] == 141
    assert manifest.recall_at_10 >= 0.95
    assert recall(searcher, exact, queries) >= 0.95
    found, scores = searcher.search(queries[:5], top_k=10)
    truth = np.stack([exact.scores(query, row) for query, row in zip(queries, found, strict=False)])
    np.testing.assert_allclose(scores, truth, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_the_folder_can_be_moved(built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest], tmp_path: Path) -> None:
    folder, _, vectors, manifest = built
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    here, there = ScannSearcher.open(folder, manifest), ScannSearcher.open(moved, SearcherManifest.read(moved))
    for one, other in zip(here.search(vectors[:8], top_k=5), there.search(vectors[:8], top_k=5), strict=True):
        assert np.array_equal(one, other)
    assert str(folder) not in (moved / "scann" / "scann_assets.pbtxt").read_text()
    assert there.snapshot == 3


def test_asking_for_everything_gives_everything_once(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest],
) -> None:
    folder, ids, vectors, manifest = built
    found, _ = ScannSearcher.open(folder, manifest).search(vectors[:1], top_k=len(ids) + 5)
    assert np.array_equal(np.sort(found[0, : len(ids)]), ids)
    assert (found[0, len(ids) :] == -1).all()


def test_a_pickle_is_never_loaded(built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built[0], tmp_path / "s"))
    assert not list(copy.rglob("*.pkl"))
    (copy / "scann" / "scann_docids.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(KnowledgeBaseError, match="holds a pickle"):
        ScannSearcher.open(copy, built[3])


def test_a_missing_part_is_one_sentence(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(built[0], tmp_path / "s"))
    np.save(copy / "ids.npy", built[1][:-1])
    with pytest.raises(KnowledgeBaseError, match="19999 ids for 20000 rows"):
        ScannSearcher.open(copy, built[3])
    (copy / "ids.npy").unlink()
    with pytest.raises(KnowledgeBaseError, match="not complete"):
        ScannSearcher.open(copy, built[3])


@pytest.mark.parametrize("num", [1, 3, 300])
def test_small_sets_are_scored_whole(num: int, tmp_path: Path) -> None:
    ids, vectors = clusters(num, 8)
    manifest = build_searcher("scann", ids, vectors, tmp_path / "s")
    searcher = open_searcher(tmp_path / "s", store=None)  # type: ignore[arg-type]
    assert (manifest.kind, manifest.recall_at_10) == ("scann", 1.0)
    found, scores = searcher.search(vectors[:2], top_k=5)
    exact, _ = ExactSearcher(ids, vectors).search(vectors[:2], top_k=5)
    assert np.array_equal(found, exact)
    assert np.isneginf(scores[found == -1]).all()
    assert not np.isnan(scores).any()


class Padding:
    """What ScaNN returns for a short answer: position 0 and NaN."""

    def search_batched(self, queries: np.ndarray, **_: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[2, 0, 0]], dtype=np.uint32), np.array([[0.5, np.nan, np.nan]], dtype=np.float32)


def test_padding_is_masked() -> None:
    settings = {"leaves": 0, "leaves_to_search": 0}
    searcher = ScannSearcher(Padding(), np.array([10, 11, 12]), dim=2, settings=settings, snapshot=None)
    found, scores = searcher.search(np.ones((1, 2), dtype=np.float32), top_k=3)
    assert found.tolist() == [[12, -1, -1]]
    assert scores[0, 0] == 0.5
    assert np.isneginf(scores[0, 1:]).all()


def test_what_is_not_finite_never_reaches_scann(
    built: tuple[Path, np.ndarray, np.ndarray, SearcherManifest], tmp_path: Path
) -> None:
    folder, ids, vectors, manifest = built
    query = vectors[:1].copy()
    query[0, 3] = np.inf
    with pytest.raises(KnowledgeBaseError, match="query vector is not finite"):
        ScannSearcher.open(folder, manifest).search(query, top_k=3)
    with pytest.raises(KnowledgeBaseError, match="is not finite"):
        build_searcher("scann", ids[:1], query, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_sizes_follow_the_width_of_the_vectors() -> None:
    assert scann_settings(EXACT_BELOW - 1, 512)["leaves"] == 0
    of = {dim: scann_settings(1_000_000, dim) for dim in (64, 128, 512, 768)}
    assert {settings["leaves"] for settings in of.values()} == {1000}
    assert [of[dim]["threshold"] for dim in of] == [0.2, 0.2, 0.0707, 0.0522]
    assert [of[dim]["dims_per_block"] for dim in of] == [2, 2, 3, 4]


def test_without_scann_there_is_one_sentence_and_lance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(MissingExtraError, match=r"pip install scann.*--searcher lance"):
        import_scann()
    assert choose_kind(EXACT_BELOW) == "lance"


def test_scann_is_chosen_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[Any] = []
    monkeypatch.setattr(module, "import_scann", lambda: imported.append(1))
    assert choose_kind(EXACT_BELOW) == "scann"
    assert imported
