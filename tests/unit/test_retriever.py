"""The whole of a query: components, fusion, filters, what is newer than the searcher and what is gone."""

import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from index import store as store_module
from index.embedder import DeferredEmbedder
from index.errors import KnowledgeBaseError, QueryError
from index.records import ImageLocation, StoredPair, pair_id
from index.search import lexical as lexical_module
from index.search import view as module
from index.search.duplicates import build_duplicates
from index.search.fusion import best_first, fuse
from index.search.lexical import RankBM25, build_fts
from index.search.retriever import By, Retriever
from index.search.scann_searcher import ScannSearcher
from index.search.searcher import (
    ArrayRows,
    ExactSearcher,
    StreamSearcher,
    build_searcher,
    exact_searcher,
    open_searcher,
)
from index.store import PairStore
from tests.fakes import needs_scann

DIM = 24
ONES = np.ones(DIM, dtype=np.float32)
WORDS = ["red", "blue", "dog", "cat", "house", "tree", "two", "big", "hat", "hen"]


def unit(seed: str) -> np.ndarray:
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big")
    vector = np.random.default_rng(number).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class HashEmbedder:
    """A vector for each text; an image speaks by its top left pixel."""

    name = "hash"
    dim = DIM
    fingerprint = "hash"

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([unit(text) for text in texts])

    def images(self, images: Sequence[PIL.Image.Image]) -> np.ndarray:
        return np.stack([unit(str(image.getpixel((0, 0)))) for image in images])

    prepare: Any = texts  # for the protocol: never called
    embed: Any = texts  # for the protocol: never called
    image_side: Any = texts  # for the protocol: never called
    batch_rows: Any = texts  # for the protocol: never called


def stored(key: str, caption: str, *, dataset: str = "toys", image: str | None = None) -> StoredPair:
    return StoredPair(
        id=pair_id(dataset, "s", key),
        dataset=dataset,
        source="/data",
        shard="s",
        digest="x",
        key=key,
        caption=caption,
        image=ImageLocation(uri="/data/s.tar", offset=512, size=10),
        sha256=image or f"{dataset}-{key}",
        width=len(key),
        height=3,
        metadata={"key": key},
        vector=unit(f"image {dataset} {key}"),
    )


def corpus(num: int = 300, *, dataset: str = "toys") -> list[StoredPair]:
    generator = np.random.default_rng(num)
    sizes = generator.integers(1, 8, num)
    return [stored(str(n), " ".join(generator.choice(WORDS, sizes[n])), dataset=dataset) for n in range(num)]


def make(folder: Path, pairs: Sequence[StoredPair]) -> PairStore:
    store = PairStore.create(folder, dim=DIM)
    store.add(pairs)
    build_fts(store)
    return store


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """A store that no test writes to."""
    return make(tmp_path_factory.mktemp("kb"), [*corpus(), *corpus(40, dataset="birds")])


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    return make(tmp_path, corpus(60))


def exact_retriever(store: PairStore) -> Retriever:
    return Retriever(store, exact_searcher(store), HashEmbedder())


def by_hand(store: PairStore, text: str, rule: Any, k: int) -> list[tuple[int, float, float, float]]:
    """Every pair scored and fused: what `exact` promises."""
    ids, vectors = store.ids_and_vectors()
    clip = (vectors.astype(np.float64) @ unit(text)).astype(np.float32).astype(np.float64)
    words = RankBM25(*store.captions()).scores(text, ids)
    score = fuse(ids, clip, words, rule=rule)
    return [(int(ids[i]), score[i], clip[i], words[i]) for i in best_first(ids, score)[:k]]


@pytest.mark.parametrize("rule", ["rrf", "sum", "product"])
def test_exact_search_equals_fusion_by_hand(frozen: PairStore, rule: Any) -> None:
    for text in ("red dog", "two big cats on a tree"):
        hits = exact_retriever(frozen).search(text, k=7, fusion=rule, exact=True).hits
        expected = by_hand(frozen, text, rule, 7)
        assert [hit.id for hit in hits] == [row[0] for row in expected]
        got = [(hit.score, hit.clip, hit.bm25) for hit in hits]
        np.testing.assert_allclose(np.array(got, dtype=float), [row[1:] for row in expected], rtol=1e-5, atol=1e-6)
        assert [hit.rank for hit in hits] == list(range(1, 8))


def test_every_candidate_has_both_raw_scores(frozen: PairStore) -> None:
    ids, vectors = frozen.ids_and_vectors()
    rows = {int(i): vector for i, vector in zip(ids, vectors, strict=True)}
    words = RankBM25(*frozen.captions())
    hits = exact_retriever(frozen).search("blue house", k=60).hits
    for hit in hits:
        assert hit.clip == pytest.approx(float(rows[hit.id] @ unit("blue house")), abs=1e-6)
        assert hit.bm25 == pytest.approx(words.scores("blue house", np.array([hit.id]))[0], rel=1e-6)
    assert min(hit.bm25 for hit in hits if hit.bm25 is not None) == 0.0
    assert min(hit.clip for hit in hits if hit.clip is not None) < 0.0


@pytest.mark.parametrize(("by", "has"), [("clip", (True, False)), ("bm25", (False, True)), ("tfidf", (False, False))])
def test_a_component_not_asked_for_is_none(frozen: PairStore, by: By, has: tuple[bool, bool]) -> None:
    hits = exact_retriever(frozen).search("red dog", by=by).hits
    assert len(hits) == 5
    assert all((hit.clip is not None, hit.bm25 is not None) == has for hit in hits)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    if by == "clip":
        assert scores == [hit.clip for hit in hits]
    if by == "bm25":
        assert scores == [hit.bm25 for hit in hits]


@pytest.mark.parametrize("by", ["hybrid", "clip", "bm25", "tfidf"])
def test_many_at_once_equals_one_by_one(frozen: PairStore, by: By) -> None:
    retriever = exact_retriever(frozen)
    texts = [f"{one} {other} {n}" for n, one in enumerate(WORDS) for other in WORDS[:3]]
    together = retriever.search_many(texts, k=6, by=by)
    for text, hits in zip(texts, together, strict=True):
        alone = retriever.search(text, k=6, by=by).hits
        assert [hit.id for hit in hits] == [hit.id for hit in alone]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in alone], rtol=1e-5)


def test_many_at_once_exclude_each_their_own(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    first = [hits[0].id for hits in retriever.search_many(["red dog", "cat"], k=1)]
    again = retriever.search_many(["red dog", "cat"], k=100, exclude=[[first[0]], [first[1]]])
    assert first[0] not in {hit.id for hit in again[0]}
    assert first[1] not in {hit.id for hit in again[1]}
    assert {hit.id for hit in again[1]} != {hit.id for hit in again[0]}
    assert retriever.search_many([]) == []


def nearest_by_hand(
    store: PairStore, vectors: np.ndarray, *, k: int, where: str | None, exclude: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    ids, rows = store.ids_and_vectors(where)
    found, scores = np.full((len(vectors), k), -1), np.full((len(vectors), k), -np.inf, np.float32)
    for n, (vector, gone) in enumerate(zip(vectors, exclude, strict=True)):
        kept = ~np.isin(ids, np.array(gone, dtype=np.int64))
        products = (rows[kept].astype(np.float64) @ (vector / np.linalg.norm(vector))).astype(np.float32)
        best = best_first(ids[kept], products.astype(np.float64))[:k]
        found[n, : len(best)], scores[n, : len(best)] = ids[kept][best], products[best]
    return found, scores


@pytest.mark.parametrize("kind", ["exact", "lance", pytest.param("scann", marks=needs_scann)])
def test_nearest_is_the_k_best_of_what_is_there_now(store: PairStore, tmp_path: Path, kind: Any) -> None:
    build_searcher(kind, ArrayRows(*store.ids_and_vectors()), tmp_path / "old", snapshot=store.high_water)
    retriever = Retriever(store, open_searcher(tmp_path / "old", store))
    store.remove(store.matching_ids()[::3].tolist())
    store.add(corpus(20, dataset="birds"))
    texts = [f"{one} {other}" for one in WORDS for other in WORDS[:3]]
    vectors = np.stack([3 * unit(text) for text in texts])
    own = [store.matching_ids()[n % 7 : n % 11].tolist() for n in range(len(texts))]
    nobody: list[list[int]] = [[]] * len(texts)
    for where in (None, "dataset = 'birds'", "width > 99"):
        for k, exclude in ((1, nobody), (5, own), (70, nobody), (70, own)):
            ids, scores = retriever.nearest(vectors, k=k, where=where, exclude=None if exclude is nobody else exclude)
            expected, products = nearest_by_hand(store, vectors, k=k, where=where, exclude=exclude)
            assert (ids.shape, ids.dtype, scores.dtype) == ((30, k), np.int64, np.float32)
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_allclose(scores, products, rtol=1e-5, atol=1e-6)
    best = retriever.nearest(vectors, k=1, exact=True)[0].tolist()
    others = retriever.nearest(vectors, k=5, exact=True, exclude_group_of=best)[0]
    np.testing.assert_array_equal(others, nearest_by_hand(store, vectors, k=5, where=None, exclude=best)[0])


@pytest.mark.usefixtures("untyped_caller")
def test_nearest_says_what_it_cannot_compare(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    assert [each.shape for each in retriever.nearest(np.empty((0, DIM), np.float32), k=3)] == [(0, 3), (0, 3)]
    for given, message in (
        ({"vectors": np.zeros((1, DIM), np.float32)}, "must be finite and not zero"),
        ({"vectors": ONES[None], "exclude": []}, "1 vectors need as many lists of excluded ids, got 0"),
        ({"vectors": ONES[None], "k": 0}, "k must be at least 1"),
        ({"vectors": ONES[None], "where": "width ="}, "cannot filter by"),
    ):
        with pytest.raises(QueryError, match=message):
            retriever.nearest(**given)
    with pytest.raises(KnowledgeBaseError, match="the query vector has 3 numbers"):
        retriever.nearest(np.ones((1, 3), np.float32))


def test_excluding_the_best_brings_up_the_next(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    whole = [hit.id for hit in retriever.search("red dog", k=30, exact=True).hits]
    best = set(whole[:20])
    rest = retriever.search("red dog", k=10, exclude=[*best, 10**20]).hits  # no row can have the last
    assert len(rest) == 10
    assert not best & {hit.id for hit in rest}


@pytest.mark.parametrize("by", ["hybrid", "clip", "bm25", "tfidf"])
def test_a_filter_gives_k_when_k_are_there(frozen: PairStore, by: By) -> None:
    hits = (
        exact_retriever(frozen).search("hen red dog hat tree two big cat house blue", k=40, by=by, dataset="birds").hits
    )
    assert {hit.dataset for hit in hits} == {"birds"}
    assert len(hits) == 40
    narrow = exact_retriever(frozen).search("red dog", k=9, where="width = 1", by="clip", dataset="birds").hits
    assert len(narrow) == 9
    assert exact_retriever(frozen).search("red", where="width = 1 OR width = 2", dataset="o'ne").hits == []


def test_a_filter_that_does_not_parse_is_a_query_error(frozen: PairStore) -> None:
    with pytest.raises(QueryError, match="cannot filter"):
        exact_retriever(frozen).search("red", where="width =")


def test_a_threshold_bounds_the_fused_score(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    whole = retriever.search("red dog", k=20, fusion="sum").hits
    bound = whole[7].score
    assert [hit.id for hit in retriever.search("red dog", k=20, fusion="sum", min_score=bound).hits] == [
        hit.id for hit in whole if hit.score >= bound
    ]
    assert retriever.search("red dog", min_score=9.0).hits == []


def test_k_counts_distinct_images(tmp_path: Path) -> None:
    same = [stored(f"same{n}", "red dog", image="one picture") for n in range(250)]
    store = make(tmp_path, [*same, stored("x", "red dog"), stored("y", "red"), stored("z", "dog")])
    for by in ("hybrid", "clip", "bm25"):
        hits = exact_retriever(store).search("red dog", k=4, by=by).hits  # type: ignore[arg-type]
        assert len(hits) == 4
        assert sum(hit.metadata["key"].startswith("same") for hit in hits) == 1
    assert [len(hits) for hits in exact_retriever(store).search_many(["red dog", "dog"], k=4)] == [4, 4]


def test_k_may_exceed_the_knowledge_base(store: PairStore) -> None:
    hits = exact_retriever(store).search("red dog", k=1000).hits
    assert len(hits) == len({hit.id for hit in hits}) == 60


def test_images_and_vectors_take_the_place_of_text(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    image = PIL.Image.new("RGB", (4, 4), (9, 8, 7))
    by_image = retriever.search(image=image, k=5).hits
    by_vector = retriever.search(vector=3 * unit("(9, 8, 7)"), k=5).hits
    assert [hit.id for hit in by_image] == [hit.id for hit in by_vector]
    assert all(hit.bm25 is None for hit in by_image)
    both = retriever.search("red dog", image=image, k=5).hits
    assert all(hit.bm25 is not None for hit in both)
    ids, vectors = frozen.ids_and_vectors()
    row = vectors[ids.tolist().index(both[0].id)]
    assert both[0].clip == pytest.approx(float(row @ unit("(9, 8, 7)")), abs=1e-6)


def test_own_image_is_found_first(frozen: PairStore) -> None:
    wanted = pair_id("toys", "s", "17")
    hit = exact_retriever(frozen).search(vector=unit("image toys 17"), k=1).hits[0]
    assert (hit.id, hit.caption) == (wanted, frozen.get([wanted])[0].caption)
    assert hit.clip == pytest.approx(1.0, abs=1e-6)
    assert (hit.image, hit.dataset, hit.metadata) == (frozen.get([wanted])[0].image, "toys", {"key": "17"})


def test_time_is_told_by_part(frozen: PairStore) -> None:
    timings = exact_retriever(frozen).search("red dog").timings_ms
    assert list(timings) == [
        *("load", "embed", "decompose", "filter", "vector", "lexical", "fuse", "diversity", "fetch")
    ]
    assert all(timings[name] > 0 for name in ("embed", "vector", "lexical", "fuse", "fetch"))
    assert timings["load"] == timings["decompose"] == timings["filter"] == 0.0


@pytest.mark.parametrize("kind", ["exact", pytest.param("scann", marks=needs_scann), "lance"])
@pytest.mark.parametrize("has_snapshot", [True, False])
def test_an_old_searcher_still_answers_for_the_store_of_today(
    store: PairStore, tmp_path: Path, kind: Any, has_snapshot: bool
) -> None:
    ids, vectors = store.ids_and_vectors()
    snapshot = store.high_water if has_snapshot else None
    build_searcher(kind, ArrayRows(ids, vectors), tmp_path / "old", snapshot=snapshot)
    if kind == "exact":
        old: Any = ExactSearcher(ids, vectors, snapshot=snapshot)
    else:
        old = open_searcher(tmp_path / "old", store)
    retriever = Retriever(store, old, HashEmbedder())
    first = retriever.search("red dog", k=60).hits
    gone = [hit.id for hit in first[:40]]
    store.remove(gone)
    new = [stored(f"new{n}", "red dog", dataset="birds") for n in range(3)]
    store.add(new)
    for by in ("hybrid", "clip"):
        hits = retriever.search("red dog", k=60, by=by).hits  # type: ignore[arg-type]
        assert len(hits) == 23
        assert not set(gone) & {hit.id for hit in hits}
        assert {pair.id for pair in new} <= {hit.id for hit in hits}
        assert len(retriever.search("red dog", k=3, by=by, dataset="birds").hits) == 3  # type: ignore[arg-type]
    fresh = exact_retriever(store).search("red dog", k=60, by="clip").hits
    assert [hit.id for hit in retriever.search("red dog", k=60, by="clip").hits] == [hit.id for hit in fresh]


class Owing(ExactSearcher):
    """One that finds what it owes and not a row more."""

    def search(self, queries: np.ndarray, *, top_k: int, recall_at: int | None = None, above: Any = None) -> Any:
        ids, scores = super().search(queries, top_k=top_k)
        owed = top_k if recall_at is None else recall_at
        ids[:, owed:], scores[:, owed:] = -1, -np.inf
        return ids, scores


@pytest.mark.parametrize("asked", [{}, {"diversity": 0.4}, {"exclude_group_of": set(range(9))}, {"min_clip": 0.1}])
def test_what_a_searcher_owes_is_enough_for_the_hits(frozen: PairStore, asked: dict[str, Any]) -> None:
    ids, vectors = frozen.ids_and_vectors()
    exact = exact_retriever(frozen)
    owing = Retriever(frozen, Owing(ids, vectors, snapshot=frozen.high_water), HashEmbedder())
    if "exclude_group_of" in asked:
        asked = {"exclude_group_of": {hit.id for hit in exact.search("red dog", k=9, by="clip").hits}}
    for k in (1, 5, 30):
        expected = [hit.id for hit in exact.search("red dog", k=k, by="clip", **asked).hits]
        assert [hit.id for hit in owing.search("red dog", k=k, by="clip", **asked).hits] == expected


@pytest.mark.parametrize("asked", [{}, {"by": "clip"}, {"where": "width = 1 OR width = 2"}, {"dataset": "birds"}])
def test_exact_search_does_not_load_vectors_that_take_much_memory(
    frozen: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    build_searcher("lance", ArrayRows(*frozen.ids_and_vectors()), tmp_path / "old", snapshot=frozen.high_water)
    in_memory = exact_retriever(frozen)
    expected = in_memory.search("red dog", k=9, exact=True, **asked)
    place = in_memory.standing(expected.hits[4].id, "red dog", **asked)
    monkeypatch.setattr("index.search.sizes.HELD_SHARE", 0.0)
    monkeypatch.setattr(module, "exact_searcher", lambda *_: pytest.fail("the vectors are loaded"))
    streamed = Retriever(frozen, open_searcher(tmp_path / "old", frozen), HashEmbedder())
    found = streamed.search("red dog", k=9, exact=True, **asked)
    assert (found.hits, found.examined) == (expected.hits, expected.examined)
    assert streamed.standing(expected.hits[4].id, "red dog", **asked) == place


@pytest.mark.parametrize("many", [False, True])
def test_one_query_sees_the_store_of_one_moment(store: PairStore, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    monkeypatch.setattr(module, "has_fts", lambda store: False)  # words are read once, and vectors too
    retriever = exact_retriever(store)
    first = retriever.search("red dog", k=3).hits
    embed = HashEmbedder.texts

    def meanwhile(embedder: HashEmbedder, texts: list[str]) -> Any:
        store.remove([first[0].id])  # as by another thread
        return embed(embedder, texts)

    monkeypatch.setattr(HashEmbedder, "texts", meanwhile)
    hits = retriever.search_many(["red dog"], k=2)[0] if many else retriever.search("red dog", k=2).hits
    assert [hit.id for hit in hits] == [hit.id for hit in first[1:]]


def test_a_replaced_row_is_searched_by_its_new_vector(store: PairStore) -> None:
    retriever = exact_retriever(store)
    old = store.get([pair_id("toys", "s", "5")], vectors=True)[0]
    replaced = stored("5", "zebra")
    object.__setattr__(replaced, "vector", unit("somewhere else"))
    store.add([replaced])
    hits = retriever.search(vector=unit("somewhere else"), k=2).hits
    assert (hits[0].id, hits[0].caption) == (old.id, "zebra")
    assert hits[0].clip == pytest.approx(1.0, abs=1e-6)
    assert old.vector is not None
    best = retriever.search(vector=old.vector, k=60).hits[0]
    assert best.clip is not None
    assert best.clip < 0.99


def test_a_large_subset_is_searched_by_the_searcher(frozen: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = exact_retriever(frozen).search("red dog", k=20, where="dataset = 'birds' OR width = 2", by="clip").hits
    monkeypatch.setattr(module, "_SMALL_SUBSET", 0)
    asked: list[int] = []
    searcher = exact_searcher(frozen)
    search = searcher.search

    def watched(queries: np.ndarray, *, top_k: int, **_: Any) -> Any:
        asked.append(top_k)
        return search(queries, top_k=top_k)

    monkeypatch.setattr(searcher, "search", watched)
    retriever = Retriever(frozen, searcher, HashEmbedder())
    hits = retriever.search("red dog", k=20, where="dataset = 'birds' OR width = 2", by="clip").hits
    assert [hit.id for hit in hits] == [hit.id for hit in plain]
    assert asked[0] > 100, "more is asked for than is wanted, because the filter takes some away"


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["streamed", "held"])
def test_without_a_searcher_rows_are_compared_when_vectors_are_asked_for(
    frozen: PairStore, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr("index.search.sizes.HELD_SHARE", share)
    read: list[str] = []

    def watch(name: str) -> None:
        original = getattr(frozen, name)
        monkeypatch.setattr(frozen, name, lambda *asked, **options: (read.append(name), original(*asked, **options))[1])

    watch("ids_and_vectors")
    watch("vector_batches")
    unbuilt = Retriever(frozen, StreamSearcher(frozen), HashEmbedder())
    found = unbuilt.search("red dog", k=9, by="bm25").hits
    assert not read
    held = exact_retriever(frozen)
    assert found == held.search("red dog", k=9, by="bm25").hits
    for asked in (
        {},
        {"by": "clip"},
        {"where": "width = 2"},
        {"dataset": "birds"},
        {"exact": True},
        {"diversity": 0.5},
    ):
        got, expected = (each.search("red dog", k=9, **asked) for each in (unbuilt, held))
        assert (got.hits, got.examined) == (expected.hits, expected.examined)
    assert ("vector_batches" in read) == (share == 0.0)


def test_without_a_word_index_the_captions_are_read(tmp_path: Path) -> None:
    store = PairStore.create(tmp_path, dim=DIM)
    store.add(corpus(20))
    assert len(exact_retriever(store).search("red dog", by="bm25", k=2).hits) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "  "}, "query text is empty"),
        ({}, "nothing to search for"),
        ({"text": "x", "k": 0}, "k must be at least 1, got 0"),
        ({"text": "x", "by": "cosine"}, "by is one of hybrid, clip, bm25, tfidf, got 'cosine'"),
        ({"text": "x", "fusion": "max"}, "fusion is one of rrf, sum, product, got 'max'"),
        ({"vector": ONES, "by": "bm25"}, "bm25 needs a text"),
        ({"vector": 0 * ONES}, "finite and not zero"),
        ({"vector": ONES, "image": PIL.Image.new("RGB", (1, 1))}, "not both"),
    ],
)
@pytest.mark.usefixtures("untyped_caller")
def test_impossible_queries_are_one_sentence(frozen: PairStore, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        exact_retriever(frozen).search(**arguments)


def test_words_that_match_nothing_leave_clip_to_decide(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    assert retriever.search("zebra", by="bm25").hits == []
    hybrid = retriever.search("zebra", k=5).hits
    assert [hit.id for hit in hybrid] == [hit.id for hit in retriever.search("zebra", by="clip", k=5).hits]
    assert all(hit.bm25 == 0.0 for hit in hybrid)


def test_an_empty_knowledge_base_is_one_sentence(tmp_path: Path) -> None:
    store = PairStore.create(tmp_path, dim=DIM)
    for search in (exact_retriever(store).search, lambda text: exact_retriever(store).search_many([text])):
        with pytest.raises(KnowledgeBaseError, match="the knowledge base is empty"):
            search("red dog")


def test_words_need_no_model(frozen: PairStore) -> None:
    retriever = Retriever(frozen, exact_searcher(frozen))
    assert len(retriever.search("red dog", by="bm25").hits) == 5
    assert len(retriever.search("red dog", vector=unit("x")).hits) == 5
    with pytest.raises(QueryError, match="name it with --model"):
        retriever.search("red dog")


def test_lists_of_different_lengths_are_refused(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    with pytest.raises(QueryError, match="2 texts need as many vectors, got 1"):
        retriever.search_many(["a", "b"], vectors=unit("a")[None])
    with pytest.raises(QueryError, match="2 texts need as many lists of excluded ids, got 1"):
        retriever.search_many(["a", "b"], exclude=[[1]])


# Duplicates, diversity, decomposition


def near_copies() -> list[StoredPair]:
    """Two pictures alike to the eye, of other bytes; and a third."""
    one, copy, other = stored("one", "red dog"), stored("copy", "red dog"), stored("other", "red dog")
    object.__setattr__(copy, "vector", one.vector)
    return [one, copy, other]


def grouped_retriever(store: PairStore, folder: Path) -> Retriever:
    searcher = exact_searcher(store)
    return Retriever(store, searcher, HashEmbedder(), duplicates=build_duplicates(store, searcher, folder))


@pytest.mark.parametrize("by", ["hybrid", "clip", "bm25"])
def test_no_two_hits_are_of_one_group(tmp_path: Path, by: By) -> None:
    retriever = grouped_retriever(make(tmp_path, near_copies()), tmp_path / "groups")
    result = retriever.search("red dog", k=3, by=by)
    assert len({hit.metadata["key"] for hit in result.hits} & {"one", "copy"}) == 1
    assert len(result.hits) == 2
    assert result.shortfall == "2 of 3 hits: 1 duplicate of shown images"
    assert [len(hits) for hits in retriever.search_many(["red dog", "dog"], k=3, by=by)] == [2, 2]


def test_a_row_newer_than_the_groups_is_told_apart_by_its_bytes(tmp_path: Path) -> None:
    store = make(tmp_path, near_copies())
    retriever = grouped_retriever(store, tmp_path / "groups")
    same = stored("newer", "red dog", image="toys-other")
    store.add([same])
    hits = retriever.search("red dog", k=9).hits
    assert len(hits) == 2
    assert len({hit.metadata["key"] for hit in hits} & {"other", "newer"}) == 1
    replaced = stored("copy", "red dog", image="quite another")
    store.add([replaced])
    assert len(retriever.search("red dog", k=9).hits) == 3, "what was replaced is in no group any more"


@pytest.mark.parametrize("is_grouped", [True, False])
def test_a_group_is_excluded_whole(tmp_path: Path, is_grouped: bool) -> None:
    pairs = [*near_copies(), stored("bytes", "red dog", image="toys-one"), stored("x", "red"), stored("y", "dog")]
    store = make(tmp_path, pairs)
    retriever = grouped_retriever(store, tmp_path / "groups") if is_grouped else exact_retriever(store)
    ids = {pair.key: pair.id for pair in pairs}
    left = {"other", "x", "y"} if is_grouped else {"copy", "other", "x", "y"}
    for name in ("one", "bytes"):
        hits = retriever.search("red dog", k=9, exclude_group_of=[ids[name]]).hits
        assert {hit.metadata["key"] for hit in hits} == left
    many = retriever.search_many(["red dog", "red"], k=9, exclude=[[], [ids["x"]]], exclude_group_of=[[ids["one"]], []])
    assert {hit.metadata["key"] for hit in many[0]} == left
    assert ids["x"] not in {hit.id for hit in many[1]}
    with pytest.raises(QueryError, match="1 texts need as many lists of excluded groups, got 2"):
        retriever.search_many(["red"], exclude_group_of=[[], []])


def test_images_without_a_digest_are_distinct(tmp_path: Path) -> None:
    pairs = [stored(str(n), "red dog") for n in range(4)]
    for pair in pairs:
        object.__setattr__(pair, "sha256", None)
    store = make(tmp_path, pairs)
    assert len(exact_retriever(store).search("red dog", k=4).hits) == 4
    kept = exact_retriever(store).search("red dog", k=4, exclude_group_of=[pairs[0].id]).hits
    assert {hit.id for hit in kept} == {pair.id for pair in pairs[1:]}


def test_diversity_reorders_the_candidates_and_off_changes_nothing(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    plain = retriever.search("red dog", k=20)
    off = retriever.search("red dog", k=20, diversity=0.0)
    assert off.hits == plain.hits
    spread_out = retriever.search("red dog", k=20, diversity=0.7)
    assert spread_out.hits[0].id == plain.hits[0].id
    assert [hit.id for hit in spread_out.hits] != [hit.id for hit in plain.hits]

    def likeness(hits: Sequence[Any]) -> float:
        rows = np.stack([pair.vector for pair in frozen.get([hit.id for hit in hits], vectors=True)])  # type: ignore[misc]
        return float((rows @ rows.T)[np.triu_indices(len(rows), 1)].mean())

    assert likeness(spread_out.hits) < likeness(plain.hits)
    many = retriever.search_many(["red dog", "cat"], k=20, diversity=0.7)
    assert [hit.id for hit in many[0]] == [hit.id for hit in spread_out.hits]


def scenes(tmp_path: Path) -> PairStore:
    things = ["wolf", "dove", "flag of Chad", "pink heart"]
    pairs = [stored(f"{thing} {n}", thing) for thing in things for n in range(3)]
    return make(tmp_path, [*pairs, *corpus(60)])


@pytest.mark.parametrize("decompose", ["phrases", "terms"])
def test_a_prompt_of_two_things_gets_neighbours_of_both(tmp_path: Path, decompose: Any) -> None:
    retriever = exact_retriever(scenes(tmp_path))
    prompt = "a wolf left of a flag of Chad on a pink background"
    for k in (2, 4):
        result = retriever.search(prompt, k=k, by="bm25", decompose=decompose)
        captions = [hit.caption for hit in result.hits]
        assert captions.count("wolf") == captions.count("flag of Chad") == k // 2
        assert all(hit.part and set(hit.caption.lower().split()) & set(hit.part.lower().split()) for hit in result.hits)
        assert all(hit.to_json()["part"] == hit.part for hit in result.hits)
        (many, alone) = retriever.search_many([prompt, "dove"], k=k, by="bm25", decompose=decompose)
        assert [hit.id for hit in many] == [hit.id for hit in result.hits]
        assert {hit.caption for hit in alone} == {"dove"}
    assert result.parts == (["a wolf", "a flag of Chad"] if decompose == "phrases" else ["a wolf, a flag of Chad"])
    assert "part" not in retriever.search(prompt, by="bm25").hits[0].to_json()


@pytest.mark.parametrize("decompose", ["phrases", "terms"])
def test_the_ground_does_not_outweigh_the_subject(tmp_path: Path, decompose: Any) -> None:
    hits = exact_retriever(scenes(tmp_path)).search("dove on pink", k=2, by="bm25", decompose=decompose).hits
    assert {hit.caption for hit in hits} == {"dove"}


def test_parts_are_each_what_they_are_alone(tmp_path: Path) -> None:
    retriever = exact_retriever(scenes(tmp_path))
    result = retriever.search("a wolf above a dove", k=6, decompose="phrases")
    assert result.parts == ["a wolf", "a dove"]
    for part in result.parts:
        alone = retriever.search(part, k=3).hits
        own = [hit for hit in result.hits if hit.part == part]
        assert [(hit.id, hit.score, hit.clip, hit.bm25) for hit in own] == [
            (hit.id, hit.score, hit.clip, hit.bm25) for hit in alone
        ]


# Filters, thresholds, and what is told of them


@pytest.mark.parametrize("by", ["clip", "bm25", "hybrid"])
def test_bounds_on_the_components(frozen: PairStore, by: By) -> None:
    retriever = exact_retriever(frozen)
    whole = retriever.search("red dog", k=340, by=by, exact=True).hits
    bounds = {"clip": {"min_clip": 0.1}, "bm25": {"min_bm25": 1.0}, "hybrid": {"min_clip": 0.1, "min_bm25": 1.0}}[by]
    hits = retriever.search("red dog", k=340, by=by, exact=True, **bounds).hits  # type: ignore[arg-type]
    assert 0 < len(hits) < len(whole)
    expected = [
        hit.id
        for hit in whole
        if (hit.clip is None or hit.clip >= bounds.get("min_clip", -1))
        and (hit.bm25 is None or hit.bm25 >= bounds.get("min_bm25", -1))
    ]
    assert [hit.id for hit in hits] == expected
    many = retriever.search_many(["red dog", "cat"], k=340, by=by, exact=True, **bounds)  # type: ignore[arg-type]
    assert [hit.id for hit in many[0]] == expected


@pytest.mark.parametrize(
    ("asked", "shortfall"),
    [
        ({"k": 5, "where": "width = 3 AND dataset = 'birds'"}, "0 of 5 hits: the filter leaves 0 pairs"),
        ({"k": 41, "dataset": "birds"}, "40 of 41 hits: the filter leaves 40 pairs"),
        ({"k": 350}, "340 of 350 hits: the knowledge base has 340 pairs"),
        ({"k": 5, "fusion": "sum", "min_score": 9.0}, "0 of 5 hits: min_score leaves out .* candidates"),
        ({"k": 5, "by": "bm25", "text": "zebra"}, "0 of 5 hits: 0 captions share a word with the query"),
        ({"k": 5}, None),
    ],
)
def test_fewer_hits_than_asked_for_are_explained(frozen: PairStore, asked: dict[str, Any], shortfall: str) -> None:
    result = exact_retriever(frozen).search(**{"text": "red dog", **asked})
    if shortfall is None:
        assert result.shortfall is None
    else:
        assert result.shortfall is not None
        assert re.fullmatch(shortfall, result.shortfall)


def test_stages_lead_from_all_pairs_to_the_hits(frozen: PairStore) -> None:
    result = exact_retriever(frozen).search("red dog", k=3, dataset="toys", min_clip=0.0)
    stages = {stage.stage: stage.kept for stage in result.stages}
    assert list(stages) == ["filter", "vector", "words", "union", "thresholds", "duplicates", "k"]
    assert (stages["filter"], stages["vector"], stages["k"]) == (300, 100, 3)
    assert stages["union"] <= stages["vector"] + stages["words"]
    assert stages["union"] > stages["thresholds"] >= stages["duplicates"] >= stages["k"]
    assert (result.matching, result.examined) == (300, 300)
    assert all(stage.ms >= 0 for stage in result.stages)
    clocked = sum(stage.ms for stage in result.stages) + sum(
        result.timings_ms[name] for name in ("load", "embed", "decompose")
    )
    assert clocked == pytest.approx(sum(result.timings_ms.values()))
    assert result.stages[0].to_json() == {"stage": "filter", "kept": 300, "ms": round(result.stages[0].ms, 3)}


@pytest.mark.parametrize("by", ["clip", "bm25", "hybrid"])
@pytest.mark.parametrize("where", ["width = 2", "dataset = 'birds' AND width = 1", "width < 9"])
def test_a_filter_however_it_is_applied_gives_the_same(
    frozen: PairStore, by: By, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pushed down or over-fetched, small subset or large: one answer."""
    expected = exact_retriever(frozen).search("red dog", k=12, by=by, where=where)
    assert all(eval_where(where, hit) for hit in expected.hits)
    for small, share, length in ((0, 0.0, 0), (0, 0.0, 10**6), (0, 2.0, 0), (10**6, 0.0, 0)):
        monkeypatch.setattr(module, "_SMALL_SUBSET", small)
        monkeypatch.setattr(store_module, "MAP_SHARE", share)
        monkeypatch.setattr(lexical_module, "_MANY_ROWS", 0)
        monkeypatch.setattr(lexical_module, "_LONG_LIST", length)
        hits = exact_retriever(frozen).search("red dog", k=12, by=by, where=where).hits
        assert [hit.id for hit in hits] == [hit.id for hit in expected.hits]


def eval_where(where: str, hit: Any) -> bool:
    row = {"width": len(hit.metadata["key"]), "dataset": hit.dataset}
    return bool(eval(where.replace(" = ", " == ").replace("AND", "and"), {}, row))


def test_filters_are_remembered_until_the_store_changes(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = exact_retriever(store)
    asked: list[str | None] = []
    matching = store.matching_ids

    def watched(where: str | None = None) -> Any:
        asked.append(where)
        return matching(where)

    monkeypatch.setattr(store, "matching_ids", watched)
    for _ in range(3):
        retriever.search("red dog", where="width = 1")
    assert asked == ["width = 1"]
    store.add([stored("a", "red dog")])
    found = retriever.search("red dog", k=60, where="width = 1").hits
    assert pair_id("toys", "s", "a") in {hit.id for hit in found}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "x", "diversity": 2.0}, "diversity lies between 0"),
        ({"text": "x", "decompose": "words"}, "decompose is one of off, phrases, terms, got 'words'"),
        ({"text": "x", "by": "bm25", "min_clip": 0.1}, "min_clip has no effect on a search by bm25"),
        ({"text": "x", "by": "clip", "min_bm25": 0.1}, "min_bm25 has no effect on a search by clip"),
        ({"text": "x", "vector": ONES, "decompose": "terms"}, "decompose splits a text"),
    ],
)
@pytest.mark.usefixtures("untyped_caller")
def test_options_without_effect_are_refused(frozen: PairStore, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        exact_retriever(frozen).search(**arguments)


@needs_scann
def test_scann_is_loaded_when_vectors_are_searched_and_that_is_not_charged_to_the_query(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_searcher("scann", ArrayRows(*store.ids_and_vectors()), tmp_path / "s", snapshot=store.high_water)
    searcher = open_searcher(tmp_path / "s", store)
    assert isinstance(searcher, ScannSearcher)
    load = searcher.load

    def slowly() -> None:
        time.sleep(0.2)
        load()

    monkeypatch.setattr(searcher, "load", slowly)
    retriever = Retriever(store, searcher, HashEmbedder())
    few: dict[str, Any] = {"where": "width >= 0"}  # compared one by one
    for asked in ({"by": "bm25"}, {"exact": True}, few):
        assert retriever.search("red dog", **asked).timings_ms["load"] == 0
        assert searcher.late() is not None
    first, second = (retriever.search("red dog").timings_ms for _ in range(2))
    assert (first["load"] >= 200, second["load"]) == (True, 0)


def test_loading_the_model_is_not_charged_to_the_query(frozen: PairStore) -> None:
    def load(name: str) -> HashEmbedder:
        time.sleep(0.2)
        return HashEmbedder()

    deferred = DeferredEmbedder(["hash"], dim=DIM, fingerprint="hash", load=load)  # type: ignore[arg-type]
    retriever = Retriever(frozen, exact_searcher(frozen), deferred)
    first, second = (retriever.search("red dog").timings_ms for _ in range(2))
    assert first["load"] >= 200
    assert second["load"] < first["load"]


@pytest.mark.parametrize("kind", [pytest.param("scann", marks=needs_scann), "lance"])
def test_scores_of_the_words_candidates_need_not_the_store(store: PairStore, tmp_path: Path, kind: Any) -> None:
    """Whoever holds the vectors, the CLIP scores are those of the store; newer rows included."""
    ids, vectors = store.ids_and_vectors()
    build_searcher(kind, ArrayRows(ids, vectors), tmp_path / kind, snapshot=store.high_water)
    retriever = Retriever(store, open_searcher(tmp_path / kind, store), HashEmbedder())
    store.add([stored(f"new{n}", "red dog") for n in range(3)])
    wanted = np.sort(store.matching_ids())[::2]
    rows = {pair.id: pair.vector for pair in store.get(wanted, vectors=True)}
    np.testing.assert_array_equal(retriever.view.vectors(wanted), np.stack([rows[i] for i in wanted.tolist()]))
    np.testing.assert_array_equal(retriever.view.vectors(wanted[::-1]), retriever.view.vectors(wanted)[::-1])
    for hit in retriever.search("red dog", k=60).hits:
        vector = store.get([hit.id], vectors=True)[0].vector
        assert hit.clip == pytest.approx(float(vector @ unit("red dog")), abs=1e-6)


def test_bounds_are_met_from_as_deep_as_it_takes(tmp_path: Path) -> None:
    """The few that reach both bounds are the best by neither: beyond the first hundred of both lists."""
    target = unit("here")
    away = unit("away")
    near, wordy = [stored(f"near{n}", "tree") for n in range(300)], [stored(f"w{n}", "red dog red") for n in range(300)]
    both = [stored(f"both{n}", "a red dog in a house") for n in range(4)]
    for pairs, vector in ((near, target), (wordy, away), (both, 0.8 * target + 0.1 * away)):
        for pair in pairs:
            object.__setattr__(pair, "vector", (vector / np.linalg.norm(vector)).astype(np.float32))
    store = make(tmp_path, [*near, *wordy, *both])
    retriever = exact_retriever(store)
    hits = retriever.search("red dog", vector=target, k=4, min_clip=0.5, min_bm25=0.1).hits
    assert {hit.caption for hit in hits} == {"a red dog in a house"}
    assert len(hits) == 4


def test_a_list_that_has_ended_is_not_searched_again(frozen: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = exact_retriever(frozen)
    lexical, rounds = retriever.view.lexical("bm25"), []
    search_many = lexical.search_many

    def watched(queries: Any, **asked: Any) -> Any:
        rounds.append(asked["top_k"])
        return search_many(queries, **asked)

    monkeypatch.setattr(lexical, "search_many", watched)
    assert retriever.search("zebra", by="bm25").hits == []
    assert rounds == [100]
