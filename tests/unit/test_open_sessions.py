"""Sessions that stay open see what others commit; threads share one in peace, and its memory is bounded."""

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index import knowledge_base as module
from index.knowledge_base import KnowledgeBase
from index.records import ImageLocation, StoredPair
from index.search import scann_searcher
from index.search import view as view_module
from index.search.lexical import at_once
from index.search.scann_searcher import ScannSearcher
from index.search.searcher import ExactSearcher, Searcher, StreamSearcher
from index.search.sizes import processors
from index.search.view import StoreView
from index.store import PairStore
from tests.fakes import HashEmbedder

DIM, ROWS = 32, 40


def stored(number: int, *, like: int | None = None) -> StoredPair:
    """A pair whose picture has other bytes than any, and lies where that of `like` does."""
    vector = np.random.default_rng(number if like is None else like).standard_normal(DIM).astype(np.float32)
    return StoredPair(
        id=number + 1,
        dataset="d",
        source="/data",
        shard="s",
        digest="x",
        key=str(number),
        caption=f"picture {number}",
        image=ImageLocation(uri=f"/data/{number}.png"),
        sha256=f"{number:064x}",
        width=number,
        height=1,
        vector=vector / np.linalg.norm(vector),
    )


@pytest.fixture
def writer(tmp_path: Path) -> KnowledgeBase:
    """Forty pictures, of which the last two look alike; no groups have been looked for."""
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder(dim=DIM))
    kb.store.add([*map(stored, range(ROWS - 1)), stored(ROWS - 1, like=ROWS - 2)])
    kb.build_search("exact", duplicates=False)
    kb.tag_build()
    return kb


def reader_of(writer: KnowledgeBase, **options: Any) -> KnowledgeBase:
    return KnowledgeBase.open(writer.directory, HashEmbedder(dim=DIM), **options)


def shown(kb: KnowledgeBase, k: int = 2) -> set[int]:
    """What is found for the last picture: one of the two that look alike, once that is known."""
    return {hit.id for hit in kb.search(vector=stored(ROWS - 2).vector, k=k)} & {ROWS - 1, ROWS}


def test_groups_that_land_beside_a_known_searcher_are_seen(writer: KnowledgeBase) -> None:
    reader = reader_of(writer)
    assert shown(reader) == {ROWS - 1, ROWS}
    before = writer.manifest.searcher
    writer.build_search("exact", duplicates=True)
    assert writer.manifest.searcher == before
    assert len(shown(reader)) == len(shown(reader_of(writer))) == 1


def test_a_searcher_is_named_with_its_groups(writer: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks while they are looked for goes on with the old searcher, and has the new one with them afterwards."""
    reader, names = reader_of(writer), [writer.manifest.searcher]

    def meanwhile(*given: Any, **named: Any) -> Any:
        assert shown(reader) == {ROWS - 1, ROWS}
        names.append(reader.manifest.searcher)
        return build_duplicates(*given, **named)

    build_duplicates = module.build_duplicates
    monkeypatch.setattr(module, "build_duplicates", meanwhile)
    writer.store.add([stored(100)])
    writer.build_search("exact", duplicates=True)
    assert names[0] == names[1] != writer.manifest.searcher
    assert len(shown(reader)) == 1


def test_the_name_of_a_searcher_never_comes_again(writer: KnowledgeBase) -> None:
    """A reader that sleeps through two builds has another searcher, though the rows and the settings are the same."""
    reader, names = reader_of(writer), []
    for recall in (0.9, 0.8, 0.9, 0.8):
        writer.build_search("lance", recall=recall)
        names.append(writer.manifest.searcher)
        if recall == 0.9:
            reader.search("picture 3")
            before = reader.retriever
    assert len(set(names)) == 4
    assert reader.retriever is not before


@pytest.mark.parametrize(
    "first",
    [
        lambda past: past.show(1),
        lambda past: past.quarantine(),
        lambda past: past.is_outdated(),
        lambda past: past.refresh(),
    ],
    ids=["show", "quarantine", "is_outdated", "refresh"],
)
def test_an_open_snapshot_lets_go_of_what_is_taken_down(
    writer: KnowledgeBase, first: Callable[[KnowledgeBase], object]
) -> None:
    past, vector = reader_of(writer, snapshot="build-1"), stored(7).vector
    assert vector is not None
    assert past.search(vector=vector, k=1)[0].id == 8
    writer.remove([8])
    first(past)  # and not the search itself, hears of the removal first
    ids, _ = past.retriever.nearest(vector[None], k=ROWS)
    assert 8 not in ids
    assert past.query(vector=vector, k=3).matching == len(past) == ROWS - 1
    assert len(past.search("picture 7", by="bm25", k=ROWS)) == ROWS - 1


# Threads


class LoadedAnew:
    """A searcher that is not in memory, and counts for how many queries it was loaded."""

    def __init__(self, searcher: ExactSearcher):
        self._searcher, self.asked = searcher, list[int]()
        self.ids, self.snapshot = searcher.ids, searcher.snapshot
        self.settings = {"is_resident": False}

    def search(self, queries: np.ndarray, *, top_k: int, **_: Any) -> Any:
        self.asked.append(len(queries))
        return self._searcher.search(queries, top_k=top_k)


def test_a_query_beside_it_leaves_a_look_ahead_alone(writer: KnowledgeBase) -> None:
    searcher = LoadedAnew(ExactSearcher(*writer.store.ids_and_vectors(), snapshot=writer.store.high_water))
    view = StoreView(writer.store, searcher)
    queries = np.random.default_rng(0).standard_normal((60, DIM)).astype(np.float32)
    view.expect(queries, top_k=5)

    def beside() -> None:
        view.expect(None)
        view.search(queries[:1], top_k=3, subset=None, exact=False)

    with ThreadPoolExecutor(1) as other:
        for start in range(0, 60, 20):
            found = view.search(queries[start : start + 20], top_k=5, subset=None, exact=False)
            truth = ExactSearcher(*writer.store.ids_and_vectors()).search(queries[start : start + 20], top_k=5)
            np.testing.assert_array_equal(found.ids, truth[0])
            other.submit(beside).result()
    assert searcher.asked == [60, 1, 1, 1]


def together(function: Callable[[], object]) -> None:
    """Call it in four threads at once."""
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(lambda: (barrier.wait(), function())) for _ in range(4)]:
            each.result()


def counted(calls: list[Any], result: Any) -> Callable[..., Any]:
    """A function that takes long enough for others to come to it, too."""

    def function(*given: Any) -> Any:
        calls.append(given)
        time.sleep(0.02)
        return result() if callable(result) else result

    return function


def test_threads_that_search_first_load_the_shards_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(scann_searcher, "_load", counted(calls, "ScaNN's searcher"))
    shards = [
        scann_searcher._Shard(folder=tmp_path / str(number), ids=np.arange(10) + 10 * number) for number in range(2)
    ]
    searcher = ScannSearcher(shards, dim=DIM, settings={"leaves": 0}, snapshot=None)
    together(searcher.load)
    together(shards[0].load)
    assert len(calls) == 2
    assert searcher.late() is None


def test_threads_that_ask_first_open_the_searcher_once(writer: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, calls = reader_of(writer), list[Any]()
    searcher: Searcher = reader.open_searcher()
    monkeypatch.setattr(reader, "open_searcher", counted(calls, searcher))
    together(lambda: reader.search("picture 3", k=3))
    assert len(calls) == 1


def test_threads_that_compare_every_row_read_the_vectors_once(
    writer: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, calls = StoreView(writer.store, StreamSearcher(writer.store)), list[Any]()
    monkeypatch.setattr(view_module, "exact_searcher", counted(calls, ExactSearcher(*writer.store.ids_and_vectors())))
    subset = view.subset("width >= 3")
    for among in (subset, None):
        queries = np.ones((1, DIM), np.float32)
        together(lambda queries=queries, among=among: view.search(queries, top_k=3, subset=among, exact=True))
    assert len(calls) == 2, "of the subset, and of all"


def test_there_are_no_more_threads_than_this_process_has_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {5}, raising=False)
    assert processors() == 1
    assert len(set(at_once(lambda number: (time.sleep(0.001), threading.get_ident())[1], range(8)))) == 1


# Memory


def test_the_vectors_of_many_filters_are_not_all_held(writer: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    store: PairStore = writer.store
    monkeypatch.setattr("index.search.sizes.default_ram", lambda: 4 * DIM * 50 * 10)  # fifty rows are a tenth
    view, queries = StoreView(store, StreamSearcher(store)), np.ones((1, DIM), np.float32)

    def held() -> int:
        return sum(each.vectors.nbytes for each in gc.get_objects() if type(each) is ExactSearcher)

    before = held()
    for least in (1, 2, 3, 4, 25, 30, 35):
        subset = view.subset(f"width >= {least}")
        for _ in range(2):
            found = view.search(queries, top_k=ROWS, subset=subset, exact=True)
            assert sorted(found.ids[0].tolist()) == subset.ids.tolist()
        assert 0 < held() - before <= 4 * DIM * 50
    assert held() - before == 4 * DIM * (ROWS - 25 + ROWS - 30 + ROWS - 35), "what is small stays together"
