"""The whole of a query: components, fusion, filters, what is newer than the searcher and what is gone."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from index.errors import KnowledgeBaseError, QueryError
from index.records import ImageLocation, StoredPair, pair_id
from index.search import view as module
from index.search.fusion import best_first, fuse
from index.search.lexical import RankBM25, build_fts
from index.search.retriever import By, Retriever
from index.search.searcher import ArrayRows, ExactSearcher, build_searcher, exact_searcher, open_searcher
from index.store import PairStore

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

    prepare: Any = None
    embed: Any = None


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


def test_excluding_the_best_brings_up_the_next(frozen: PairStore) -> None:
    retriever = exact_retriever(frozen)
    whole = [hit.id for hit in retriever.search("red dog", k=30, exact=True).hits]
    best = set(whole[:20])
    rest = retriever.search("red dog", k=10, exclude=best).hits
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


@pytest.mark.parametrize("kind", ["exact", "scann", "lance"])
@pytest.mark.parametrize("has_snapshot", [True, False])
def test_an_old_searcher_still_answers_for_the_store_of_today(
    store: PairStore, tmp_path: Path, kind: Any, has_snapshot: bool
) -> None:
    if kind == "scann":
        pytest.importorskip("scann", reason="ScaNN has wheels for Linux only")
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

    def watched(queries: np.ndarray, *, top_k: int) -> Any:
        asked.append(top_k)
        return search(queries, top_k=top_k)

    monkeypatch.setattr(searcher, "search", watched)
    retriever = Retriever(frozen, searcher, HashEmbedder())
    hits = retriever.search("red dog", k=20, where="dataset = 'birds' OR width = 2", by="clip").hits
    assert [hit.id for hit in hits] == [hit.id for hit in plain]
    assert asked[0] > 100, "more is asked for than is wanted, because the filter takes some away"


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
