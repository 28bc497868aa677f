"""The map of rows is a short cut: over any history of a store, every answer is the one that filters give."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from index import store as module
from index.compaction import compact
from index.knowledge_base import KnowledgeBase
from index.records import ImageLocation, ShownPair, StoredPair, pair_id
from index.search import lexical as lexical_module
from index.search.lexical import LanceBM25, Subset, build_fts
from index.snapshots import tag_build
from index.store import PairStore
from tests.fakes import HashEmbedder

DIM = 8
WORDS = ["red", "blue", "dog", "cat", "house", "tree"]
QUERIES = ["a blue cat in a tree", "red red dog"]


def stored(number: int, generator: np.random.Generator) -> StoredPair:
    vector = generator.normal(size=DIM).astype(np.float32)
    return StoredPair(
        id=pair_id("d", "s", str(number)),
        dataset="d",
        source="/data",
        shard="s",
        digest="x",
        key=str(number),
        caption=" ".join(generator.choice(WORDS, size=generator.integers(1, 5))),
        image=ImageLocation(uri="/data/s.tar", offset=number, size=1),
        sha256=f"{number:064x}",
        width=number % 10,
        height=1,
        vector=vector / np.linalg.norm(vector),
    )


def histories(store: PairStore, generator: np.random.Generator) -> Iterator[str]:
    """Change the store at random, and say what was done."""
    number = 0
    for step in range(3):
        several = range(number, number + int(generator.integers(20, 90)))
        number = several.stop
        store.add([stored(i, generator) for i in several])
        yield "added"
        if step == 0:
            build_fts(store)
            yield "indexed"
        ids = store.matching_ids()
        store.remove(generator.choice(ids, size=len(ids) // 5, replace=False).tolist())
        yield "removed"
        if step % 2:
            rewrite = store.rewrite_fragments()
            assert rewrite is not None
            store.commit_rewrite(rewrite)
            yield "compacted"
        again = generator.choice(store.matching_ids(), size=3, replace=False)
        numbers = [int(pair.key) for pair in store.get(again)]
        store.add([stored(i, generator) for i in numbers])
        yield "replaced"


def without_map(store: PairStore) -> PairStore:
    """The same table, read by filters."""
    twin = PairStore(store.directory, snapshot=store.snapshot)
    twin.row_map = lambda lookups: None  # type: ignore[method-assign]
    return twin


def assert_twins(store: PairStore, generator: np.random.Generator) -> None:
    twin = without_map(store)
    ids = twin.matching_ids()
    some = [*generator.permutation(ids)[:40].tolist(), 12345, 2**63]
    assert store.row_map(0) is not None
    assert [pair.id for pair in store.get(some)] == [i for i in some if i in set(ids.tolist())]
    assert repr(store.get(some, vectors=True)) == repr(twin.get(some, vectors=True))
    assert store.shown(some) == twin.shown(some)
    whole = {pair.id: pair for pair in twin.get(some)}
    for pair in store.shown(some):
        assert all(getattr(pair, name) == getattr(whole[pair.id], name) for name in ShownPair.__dataclass_fields__)
    fast, slow = LanceBM25(store), LanceBM25(twin)
    for query in QUERIES:
        for where, top_k in ((None, 5), (None, 500), ("width < 5", 5), ("width = 3", 500)):
            within = None if where is None else Subset(where=where, ids=np.sort(twin.matching_ids(where)))
            found, expected = (each.search(query, top_k=top_k, within=within) for each in (fast, slow))
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])
        candidates = generator.permutation(ids)[:30]
        np.testing.assert_array_equal(fast.scores(query, candidates), slow.scores(query, candidates))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is read for the first look-up, and used however small the store is."""
    monkeypatch.setattr(module, "MAP_SHARE", -1.0)


@pytest.mark.parametrize(("seed", "length"), [(0, 0), (1, 10**6)])
@pytest.mark.usefixtures("at_once")
def test_with_and_without_the_map_answers_are_the_same(
    tmp_path: Path, seed: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether words of a filter come from a mask, or from a long list of all rows."""
    monkeypatch.setattr(lexical_module, "_MANY_ROWS", 0)
    monkeypatch.setattr(lexical_module, "_LONG_LIST", length)
    generator, seen = np.random.default_rng(seed), set()
    store = PairStore.create(tmp_path, dim=DIM)
    for done in histories(store, generator):
        if "indexed" in seen | {done}:
            seen.add(done)
            assert_twins(store, generator)
    assert seen == {"added", "indexed", "removed", "compacted", "replaced"}


@pytest.mark.usefixtures("at_once")
def test_what_a_snapshot_hides_is_not_found_through_the_map(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    store = PairStore.create(tmp_path, dim=DIM)
    store.add([stored(i, generator) for i in range(200)])
    build_fts(store)
    tag_build(store, 1, in_searcher=200)
    past = PairStore(tmp_path, snapshot="build-1")
    assert_twins(past, generator)
    gone = store.remove(where="width < 3")
    past.refresh()
    assert_twins(past, generator)
    assert past.get(gone) == []
    found, _ = LanceBM25(past).search("red dog", top_k=500)
    assert not set(found.tolist()) & set(gone)


@pytest.mark.usefixtures("at_once")
def test_a_map_keeps_to_its_version_while_the_store_goes_on(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    store = PairStore.create(tmp_path, dim=DIM)
    store.add([stored(i, generator) for i in range(100)])
    ids = store.matching_ids()
    rows = store.row_map(0)
    assert rows is not None
    before = rows.read(ids, ["id", "caption"]).sort_by("id")
    store.remove(ids[:50].tolist())
    rewrite = store.rewrite_fragments()
    assert rewrite is not None
    store.commit_rewrite(rewrite)
    assert rows.read(ids, ["id", "caption"]).sort_by("id").equals(before)
    now = store.row_map(0)
    assert now is not None
    assert now is not rows
    assert now.read(ids, ["id"]).num_rows == 50


def test_who_asks_once_does_not_pay_for_the_map(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    store = PairStore.create(tmp_path, dim=DIM)
    store.add([stored(i, generator) for i in range(2000)])
    ids = store.matching_ids()
    assert store.row_map(2) is None
    assert store.row_map(1) is not None
    store.remove(ids[:1].tolist())
    assert store.row_map(1) is None, "another version, another map"


@pytest.mark.usefixtures("at_once")
def test_a_session_answers_after_each_change_as_one_that_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it keeps from one query to the next; the one that begins reads by filters, without the map."""
    generator = np.random.default_rng(5)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder(dim=DIM))
    kb.store.add([stored(i, generator) for i in range(300)])
    kb.build_search("exact")

    def opened() -> KnowledgeBase:
        return KnowledgeBase.open(tmp_path / "kb", HashEmbedder(dim=DIM))

    def answers(reader: KnowledgeBase) -> list[list[tuple[int, float, str]]]:
        asked = [{"by": by, "where": where} for by in ("hybrid", "bm25") for where in (None, "width < 2")]
        return [[(hit.id, hit.score, hit.caption) for hit in reader.search("red dog", k=9, **one)] for one in asked]

    session, found = opened(), list[object]()
    for change in (
        lambda: None,
        lambda: kb.remove(where="width = 1"),
        lambda: compact(kb),
        lambda: kb.store.add([stored(i, generator) for i in range(280, 330)]),  # twenty replaced, thirty new
        lambda: kb.build_search("exact"),
        lambda: kb.remove(where="width = 0"),
        lambda: kb.build_search("exact", duplicates=True),
    ):
        change()
        found.append(answers(session))
        with monkeypatch.context() as patch:
            patch.setattr(PairStore, "row_map", lambda self, lookups: None)
            assert found[-1] == answers(opened())
    assert found[0] != found[1] != found[3] != found[5], "the changes can be seen"
