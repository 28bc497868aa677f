"""ScaNN beside exact search, whole and in shards, saved, moved, opened, and never trusted with a pickle."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.errors import KnowledgeBaseError, MissingExtraError
from index.search import scann_searcher as module
from index.search.scann_searcher import ScannSearcher, build_scann, import_scann, scann_settings
from index.search.searcher import (
    EXACT_BELOW,
    ArrayRows,
    ExactSearcher,
    SearcherManifest,
    build_searcher,
    open_searcher,
    recall,
    shifted_queries,
)
from index.search.sizes import Structure, choose_structure
from tests.fakes import needs_scann

pytestmark = needs_scann

Built = tuple[Path, np.ndarray, np.ndarray, SearcherManifest]


def clusters(num: int, dim: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around centres, their ids in no order."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((max(1, num // 200), dim))
    vectors = centres[generator.integers(0, len(centres), num)] + 0.7 * generator.standard_normal((num, dim))
    ids = generator.choice(2**62, size=num, replace=False).astype(np.int64)
    return ids, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A searcher large enough for the tree and the quantisation."""
    ids, vectors = clusters(EXACT_BELOW, 32)
    folder = tmp_path_factory.mktemp("scann") / "searcher"
    return folder, ids, vectors, build_searcher("scann", ArrayRows(ids, vectors), folder, snapshot=3)


def test_recall_beside_exact_with_queries_it_has_not_seen(built: Built) -> None:
    folder, ids, vectors, manifest = built
    exact, queries = ExactSearcher(ids, vectors), shifted_queries(vectors, seed=77, num=100)
    searcher = ScannSearcher.open(folder, manifest)
    assert manifest.settings["leaves"] == 141
    assert manifest.recall_at_10 >= 0.92  # which of the settings that reach 0.95 is fastest differs from run to run
    assert recall(searcher, exact, queries) >= 0.92
    found, scores = searcher.search(queries[:5], top_k=10)
    truth = np.stack([exact.scores(query, row) for query, row in zip(queries, found, strict=False)])
    np.testing.assert_allclose(scores, truth, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert np.array_equal(searcher.ids, np.sort(ids))


def test_the_manifest_says_what_it_was_calibrated_on_and_the_curve(built: Built) -> None:
    manifest = built[3]
    assert (manifest.calibrated_on, manifest.target_recall) == ("shifted rows", 0.95)
    assert bool(manifest.warning) == (manifest.recall_at_10 < 0.95)
    chosen = manifest.settings["leaves_to_search"]
    assert manifest.recall_at_10 in [p.recall_at_10 for p in manifest.curve if p.leaves_to_search == chosen]
    leaves = [point.leaves_to_search for point in manifest.curve]
    assert leaves == sorted(leaves)
    recalls = [point.recall_at_10 for point in manifest.curve]
    assert min(np.diff(recalls)) > -0.01  # more leaves bring more candidates, and a few true ones are crowded out
    assert recalls[-1] > recalls[0]
    assert all(point.qps > 0 for point in manifest.curve)


def test_the_folder_can_be_moved(built: Built, tmp_path: Path) -> None:
    folder, _, vectors, manifest = built
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    here, there = ScannSearcher.open(folder, manifest), ScannSearcher.open(moved, SearcherManifest.read(moved))
    for one, other in zip(here.search(vectors[:8], top_k=5), there.search(vectors[:8], top_k=5), strict=True):
        assert np.array_equal(one, other)
    assert str(folder) not in (moved / "shard-00000" / "scann" / "scann_assets.pbtxt").read_text()
    assert there.snapshot == 3


def test_asking_for_everything_gives_everything_once(built: Built) -> None:
    folder, ids, vectors, manifest = built
    found, _ = ScannSearcher.open(folder, manifest).search(vectors[:1], top_k=len(ids) + 5)
    assert np.array_equal(np.sort(found[0, : len(ids)]), np.sort(ids))
    assert (found[0, len(ids) :] == -1).all()


def test_a_large_batch_has_the_answers_of_single_queries(built: Built) -> None:
    folder, _, vectors, manifest = built
    searcher = ScannSearcher.open(folder, manifest)
    batch, _ = searcher.search(vectors[:40], top_k=5)
    assert np.array_equal(batch, np.concatenate([searcher.search(v[None], top_k=5)[0] for v in vectors[:40]]))


def in_shards(num: int, dim: int, **changes: Any) -> Structure:
    return dataclasses.replace(choose_structure(num, dim, kind="scann"), **changes)


@pytest.mark.parametrize("vectors_in", ["memory", "disk"])
def test_shards_equal_their_merged_answers_and_exact_search_at_all_leaves(
    vectors_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.search.sizes.EXACT_BELOW", 900)  # so that a small shard has leaves
    ids, vectors = clusters(3000, 24)
    queries = shifted_queries(vectors, seed=1, num=40)
    structure = in_shards(3000, 24, shards=3, vectors=vectors_in)
    searcher = build_scann(ArrayRows(ids, vectors), tmp_path, structure)
    assert searcher.leaves == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard-00000", "shard-00001", "shard-00002"]
    assert bool(list(tmp_path.rglob("vectors.npy"))) == (vectors_in == "disk")
    parts = [
        ScannSearcher([shard], dim=24, settings=searcher.settings, snapshot=None).search(queries, top_k=10)
        for shard in searcher._shards
    ]
    order = np.argsort(-np.concatenate([s for _, s in parts], axis=1), axis=1, kind="stable")[:, :10]
    merged = np.take_along_axis(np.concatenate([i for i, _ in parts], axis=1), order, axis=1)
    assert np.array_equal(searcher.search(queries, top_k=10)[0], merged)
    exact = ExactSearcher(ids, vectors)
    found, scores = searcher.with_effort(32, 1000).search(queries, top_k=10)
    truth, exact_scores = exact.search(queries, top_k=10)
    assert np.array_equal(found, truth)
    np.testing.assert_allclose(scores, exact_scores, atol=1e-6)


def test_shards_that_are_loaded_one_at_a_time_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.search.sizes.EXACT_BELOW", 900)
    ids, vectors = clusters(2500, 16)
    rows = ArrayRows(ids, vectors)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    resident = build_scann(rows, tmp_path / "a", in_shards(2500, 16, shards=2, vectors="disk"))
    passing = build_scann(rows, tmp_path / "b", in_shards(2500, 16, shards=2, vectors="disk", is_resident=False))
    resident.search(vectors[:1], top_k=1)  # what stays is loaded when it is first asked
    loaded = []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda folder: loaded.append(folder.name) or load(folder))
    monkeypatch.setattr(passing, "settings", {**passing.settings, "leaves_to_search": 35, "reorder": 900})
    monkeypatch.setattr(resident, "settings", {**resident.settings, "leaves_to_search": 35, "reorder": 900})
    for one, other in zip(resident.search(vectors[:9], top_k=5), passing.search(vectors[:9], top_k=5), strict=True):
        assert np.array_equal(one, other)
    assert loaded == ["shard-00000", "shard-00001"]


def test_a_small_budget_makes_shards_and_keeps_vectors_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.search.sizes.EXACT_BELOW", 900)
    monkeypatch.setattr("index.search.sizes._FEWEST_TRAINING_ROWS", 900)
    ids, vectors = clusters(8000, 32)
    manifest = build_searcher("scann", ArrayRows(ids, vectors), tmp_path / "s", ram=600_000)
    assert manifest.settings["vectors"] == "disk"
    assert manifest.settings["shards"] == len(list((tmp_path / "s").glob("shard-*"))) > 1
    searcher = open_searcher(tmp_path / "s", store=None)  # type: ignore[arg-type]
    assert recall(searcher, ExactSearcher(ids, vectors), shifted_queries(vectors, seed=5, num=60)) >= 0.9


def test_a_target_out_of_reach_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.search.sizes.EXACT_BELOW", 900)
    monkeypatch.setattr("index.search.calibration._REORDERS", (10,))  # hopeless: what the codes say is what is kept
    monkeypatch.setattr("index.search.calibration._DEEPEST_REORDER", 10)
    ids, vectors = clusters(2000, 32)
    manifest = build_searcher("scann", ArrayRows(ids, vectors), tmp_path / "s", target_recall=1.0)
    assert manifest.recall_at_10 < 1.0
    assert f"recall@10 is {manifest.recall_at_10:.3f} and not the 1.0 asked for" in manifest.warning


def test_captions_are_what_it_is_calibrated_on_when_there_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.search.sizes.EXACT_BELOW", 900)
    ids, vectors = clusters(1000, 16)
    queries = shifted_queries(vectors, seed=2, num=30)
    enough = build_searcher("scann", ArrayRows(ids, vectors), tmp_path / "a", queries=queries)
    too_few = build_searcher("scann", ArrayRows(ids, vectors), tmp_path / "b", queries=queries[:29])
    assert (enough.calibrated_on, too_few.calibrated_on) == ("captions", "shifted rows")


def test_nothing_of_scanns_chatter_is_seen_and_other_lines_are(built: Built, capfd: pytest.CaptureFixture[str]) -> None:
    ids, vectors = built[1:3]
    with module._quiet():
        os.write(2, b"I0000 00:00:17.5 1 kmeans.cc:58] chatter\nE0000 00:00:17.5 1 x.cc:1] bad\nother\n")
    assert capfd.readouterr().err == "E0000 00:00:17.5 1 x.cc:1] bad\nother\n"

    def fail() -> None:
        with module._quiet():
            os.write(2, b"the reason\n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capfd.readouterr().err == "the reason\n"
    ScannSearcher.open(built[0], built[3]).search(vectors[:2], top_k=len(ids))
    assert capfd.readouterr().err == ""


def test_a_searcher_of_before_there_were_shards_is_opened(built: Built, tmp_path: Path) -> None:
    folder, _, vectors, manifest = built
    old = tmp_path / "old"
    shutil.copytree(folder / "shard-00000", old)
    names = ("leaves", "leaves_to_search", "dims_per_block", "threshold")
    settings = {name: manifest.settings[name] for name in names}
    dataclasses.replace(manifest, settings=settings).write(old)
    found, _ = open_searcher(old, store=None).search(vectors[:3], top_k=1)  # type: ignore[arg-type]
    assert found[:, 0].tolist() == built[1][:3].tolist()


def test_a_pickle_is_never_loaded(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built[0], tmp_path / "s"))
    assert not list(copy.rglob("*.pkl"))
    (copy / "shard-00000" / "scann" / "scann_docids.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(KnowledgeBaseError, match="holds a pickle"):
        ScannSearcher.open(copy, built[3])


def test_a_missing_part_is_one_sentence(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built[0], tmp_path / "s"))
    np.save(copy / "shard-00000" / "ids.npy", built[1][:-1])
    with pytest.raises(KnowledgeBaseError, match="19999 ids for 20000 rows"):
        ScannSearcher.open(copy, built[3])
    (copy / "shard-00000" / "ids.npy").unlink()
    with pytest.raises(KnowledgeBaseError, match="not complete"):
        ScannSearcher.open(copy, built[3])
    shutil.rmtree(copy / "shard-00000")
    with pytest.raises(KnowledgeBaseError, match="0 ids for 20000 rows"):
        ScannSearcher.open(copy, built[3])


@pytest.mark.parametrize("num", [1, 3, 300])
def test_small_sets_are_scored_whole(num: int, tmp_path: Path) -> None:
    ids, vectors = clusters(num, 8)
    manifest = build_searcher("scann", ArrayRows(ids, vectors), tmp_path / "s")
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


@pytest.mark.parametrize("kept", [None, np.array([[0, 0], [0, 0], [0.2, 0.3]], dtype=np.float32)])
def test_padding_is_masked(kept: np.ndarray | None) -> None:
    settings = {"leaves": 0, "leaves_to_search": 0}
    shard = module._Shard(folder=Path(), ids=np.array([10, 11, 12]), raw=Padding(), vectors=kept)
    found, scores = ScannSearcher([shard], dim=2, settings=settings, snapshot=None).search(
        np.ones((1, 2), dtype=np.float32), top_k=3
    )
    assert found.tolist() == [[12, -1, -1]]
    assert scores[0, 0] == 0.5
    assert np.isneginf(scores[0, 1:]).all()


def test_what_is_not_finite_never_reaches_scann(built: Built, tmp_path: Path) -> None:
    folder, ids, vectors, manifest = built
    query = vectors[:1].copy()
    query[0, 3] = np.inf
    with pytest.raises(KnowledgeBaseError, match="query vector is not finite"):
        ScannSearcher.open(folder, manifest).search(query, top_k=3)
    with pytest.raises(KnowledgeBaseError, match="is not finite"):
        build_searcher("scann", ArrayRows(ids[:1], query), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_an_id_in_two_shards_is_refused(tmp_path: Path) -> None:
    ids, vectors = clusters(40, 8)
    ids[39] = ids[0]
    with pytest.raises(KnowledgeBaseError, match="1 ids appear twice"):
        build_scann(ArrayRows(ids, vectors), tmp_path, in_shards(40, 8, shards=2))


def test_sizes_follow_the_width_of_the_vectors() -> None:
    assert scann_settings(EXACT_BELOW - 1, 512)["leaves"] == 0
    of = {dim: scann_settings(1_000_000, dim) for dim in (64, 128, 512, 768)}
    assert {settings["leaves"] for settings in of.values()} == {1000}
    assert [of[dim]["threshold"] for dim in of] == [0.2, 0.2, 0.0707, 0.0522]
    assert [of[dim]["dims_per_block"] for dim in of] == [2, 2, 3, 4]
    assert scann_settings(100_000_000, 512)["training_rows"] == 400_000  # bounded, however many rows


def test_without_scann_there_is_one_sentence_and_lance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(MissingExtraError, match=r"pip install scann.*--searcher lance"):
        import_scann()
    assert choose_structure(EXACT_BELOW, 16).kind == "lance"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_without_scann_what_it_built_is_searched_exactly_and_that_is_said(
    built: Built, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, is_streamed: bool
) -> None:
    folder, ids, vectors, manifest = built
    monkeypatch.setitem(sys.modules, "scann", None)
    monkeypatch.setattr("index.search.sizes.HELD_SHARE", 0.0 if is_streamed else 0.1)
    newer = ArrayRows(np.append(ids, ids.max() + 1), np.concatenate([vectors, vectors[:1]]))
    searcher = ScannSearcher.open(folder, manifest, table=newer)
    assert (searcher.note, caplog.records) == ("", [])  # nothing is said where only words are searched
    np.testing.assert_array_equal(searcher.ids, np.sort(ids))
    for _ in range(2):
        found, scores = searcher.search(vectors[:40], top_k=10)
        truth, exact = ExactSearcher(ids, vectors).search(vectors[:40], top_k=10)  # the newer row is not its own
        np.testing.assert_array_equal(found, truth)
        np.testing.assert_array_equal(scores, exact)
    assert [record.message for record in caplog.records] == [searcher.note]
    assert "20,000 pairs is compared" in searcher.note


def test_scann_is_chosen_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[Any] = []
    monkeypatch.setattr(module, "import_scann", lambda: imported.append(1))
    assert choose_structure(EXACT_BELOW, 16).kind == "scann"
    assert imported
