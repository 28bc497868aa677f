"""BM25 of two kinds against a ten-line reference and against each other, on the same words."""

import math
from pathlib import Path

import numpy as np
import pytest

from index.errors import KnowledgeBaseError, QueryError
from index.records import ImageLocation, StoredPair, pair_id
from index.search import lexical as module
from index.search.lexical import LanceBM25, RankBM25, Subset, TfIdf, build_fts, has_fts
from index.search.words import Postings, Tokenizer, report_captions
from index.store import PairStore

CAPTIONS = [
    "a red dog",
    "a red dog on a blue dog-house",
    "Café crème, RED!",
    "!!!",
    "two cats",
    "a photo of a cat and a dog and a cat",
    "Zwei Hunde auf der Stra\u00dfe",
    "dog",
]


def stored(key: str, caption: str) -> StoredPair:
    return StoredPair(
        id=pair_id("d", "s", key),
        dataset="even" if int(key) % 2 == 0 else "odd",
        source="/data",
        shard="s",
        digest="x",
        key=key,
        caption=caption,
        image=ImageLocation(uri="/data/s.tar", offset=int(key), size=1),
        sha256=key,
        width=1,
        height=1,
        vector=np.ones(2, dtype=np.float32) / np.float32(math.sqrt(2)),
    )


def fill(folder: Path, captions: list[str]) -> PairStore:
    store = PairStore.create(folder, dim=2)
    store.add([stored(str(key), caption) for key, caption in enumerate(captions)])
    build_fts(store)
    return store


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    return fill(tmp_path, CAPTIONS)


def in_memory(store: PairStore) -> RankBM25:
    return RankBM25(*store.captions())


def ten_lines(captions: list[str], query: str) -> list[float]:
    """BM25 as DESIGN has it, over captions that have a term at all."""
    cut = Tokenizer()
    documents = [cut(caption) for caption in captions]
    total = sum(map(bool, documents))
    average = sum(map(len, documents)) / total
    scores = [0.0] * len(documents)
    for term in cut(query):
        n = sum(term in document for document in documents)
        for i, document in enumerate(documents):
            f = document.count(term)
            idf = math.log(1 + (total - n + 0.5) / (n + 0.5))
            scores[i] += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(document) / average))
    return scores


QUERIES = ["red dog", "photo", "dog dog cat", "cafe CREME", "strasse", "house", "dog zebra", "cat and dog on a photo"]


def test_the_tokenizer_lower_cases_folds_and_splits() -> None:
    assert Tokenizer()("Café-crème, it's RED_2!") == ["cafe", "creme", "s", "red", "2"]
    assert Tokenizer()("Stra\u00dfe " + "x" * 100) == ["strasse", "x" * 100]
    assert Tokenizer(stop_words=())("running the dogs") == ["running", "the", "dogs"]
    assert Tokenizer()("a wolf ON the hill") == ["wolf", "hill"]
    assert Tokenizer()("of the or") == []
    assert Tokenizer()("!!! ...") == []


@pytest.mark.parametrize("query", QUERIES)
def test_rank_bm25_equals_ten_lines(store: PairStore, query: str) -> None:
    ids = np.array([pair_id("d", "s", str(key)) for key in range(len(CAPTIONS))])
    np.testing.assert_allclose(in_memory(store).scores(query, ids), ten_lines(CAPTIONS, query), rtol=1e-12)


@pytest.mark.parametrize("query", QUERIES)
def test_posting_lists_equal_rank_bm25_itself(store: PairStore, query: str) -> None:
    lexical = in_memory(store)
    ids, scores = lexical.reference(query)
    np.testing.assert_allclose(lexical.scores(query, ids), scores, rtol=1e-12)
    assert scores.any()


@pytest.mark.parametrize("query", QUERIES)
def test_lance_equals_rank_bm25(store: PairStore, query: str) -> None:
    found, scores = LanceBM25(store).search(query, top_k=20)
    expected, exact = in_memory(store).search(query, top_k=20)
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(scores, exact, rtol=1e-6)


def test_lance_equals_rank_bm25_on_many_captions(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = np.array([f"w{int(n)}" for n in generator.zipf(1.3, size=40_000) if n < 500])
    captions = [" ".join(generator.choice(words, size=size)) for size in generator.integers(1, 20, size=2000)]
    store = fill(tmp_path, captions)
    lance, memory = LanceBM25(store), in_memory(store)
    for _ in range(20):
        query = " ".join(generator.choice(words, size=6))
        found, scores = lance.search(query, top_k=100)
        expected, exact = memory.search(query, top_k=100)
        np.testing.assert_allclose(scores, exact, rtol=1e-6)
        assert np.array_equal(found, expected), "equal scores, those at the end of the list too, are in order of id"


def test_scores_of_named_rows_are_the_same_scores(store: PairStore) -> None:
    ids = store.matching_ids()[::-1]
    lance, memory = LanceBM25(store).scores("red dog", ids), in_memory(store).scores("red dog", ids)
    np.testing.assert_allclose(lance, memory, rtol=1e-6)
    assert (lance == 0).any(), "a caption without the words scores nothing"


@pytest.mark.parametrize("query", ["zebra", "!!!", "do"])
def test_words_that_match_nothing_give_nothing(store: PairStore, query: str) -> None:
    for lexical in (LanceBM25(store), in_memory(store), TfIdf(*store.captions())):
        ids, scores = lexical.search(query, top_k=5)
        assert (len(ids), len(scores)) == (0, 0)


def test_the_query_is_text_and_not_a_language(store: PairStore) -> None:
    found, _ = LanceBM25(store).search('"red" AND (dog)^2 -cat caption:', top_k=20)
    expected, _ = in_memory(store).search("red and dog 2 cat caption", top_k=20)
    assert np.array_equal(found, expected)


def test_the_order_of_the_captions_does_not_matter(store: PairStore) -> None:
    ids, captions = store.captions()
    turned = RankBM25(ids[::-1], captions[::-1])
    for got, expected in zip(
        turned.search("red dog", top_k=9), in_memory(store).search("red dog", top_k=9), strict=True
    ):
        assert np.array_equal(got, expected)


def test_a_filter_comes_before_the_top(store: PairStore) -> None:
    where = "dataset = 'odd'"
    subset = Subset(where=where, ids=np.sort(store.matching_ids(where)))
    for lexical in (LanceBM25(store), in_memory(store), TfIdf(*store.captions())):
        everything = [i for i in lexical.search("dog", top_k=20)[0].tolist() if i in subset.ids]
        assert len(everything) == 3
        assert lexical.search("dog", top_k=3, within=subset)[0].tolist() == everything


ODD = [
    "\u0130stanbul in \u0130stanbul",  # its lower case holds a mark at which it would be cut once more
    "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8",
    "\U0001f43a wolf \U0001f43a\U0001f43a",
    "x\x00y\tz\r\nw",
    "snake_case-kebab.dot/slash\\back",
    "\ufdfa \u216b \ufb01ne \u2460",
    "\u05d0\u05d1\u05d2 \u202e\u0639\u0631\u0628\u064a",
    "2" * 300 + " 3.14 1e9",
    "",
    " \u200b \u00a0 ",
    "cafe\u0301 caf\u00e9 CAFE",
    "dog " * 2000,
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    return fill(tmp_path_factory.mktemp("odd"), ODD + CAPTIONS)


@pytest.mark.parametrize("query", [text[:400] for text in ODD if Tokenizer()(text)])
def test_odd_captions_score_as_in_rank_bm25_and_explain_themselves(odd: PairStore, query: str) -> None:
    found, scores = LanceBM25(odd).search(query, top_k=20)
    expected, exact = in_memory(odd).search(query, top_k=20)
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(scores, exact, rtol=1e-6)
    own = in_memory(odd).reference(query)[1]
    np.testing.assert_allclose(np.sort(own[own > 0]), np.sort(exact), rtol=1e-12)
    for pair, score in zip(found.tolist(), scores.tolist(), strict=True):
        assert sum(LanceBM25(odd).contributions(query, pair).values()) == pytest.approx(score, rel=1e-5)


def zipf_captions(seed: int, count: int, words: int = 300) -> list[str]:
    generator = np.random.default_rng(seed)
    drawn = np.array([f"w{int(n)}" for n in generator.zipf(1.3, size=20 * count) if n < words])
    return [" ".join(generator.choice(drawn, size=size)) for size in generator.integers(1, 15, size=count)]


ZIPF_QUERIES = ["w1 w2", "w1 w7 w50 w50", "w200 w3 w9 w120", "w2 w2 w11", "w5 w40 w80 w160 w280"]


def test_the_statistics_are_those_of_the_captions(tmp_path: Path) -> None:
    captions = zipf_captions(1, 500)
    lexical = LanceBM25(fill(tmp_path, captions))
    expected = Postings(np.arange(500), captions, tokenizer=Tokenizer()).statistics()
    for query in ZIPF_QUERIES:
        got = lexical.statistics(query)
        assert (got.num_docs, got.total_length) == (expected.num_docs, expected.total_length)
        assert dict(got.frequencies) == {term: expected.frequencies.get(term, 0) for term in query.split()}


def test_statistics_of_an_index_in_several_segments_are_summed(tmp_path: Path) -> None:
    captions = zipf_captions(2, 300)
    store = fill(tmp_path, captions[:200])
    store.add([stored(str(key), captions[key]) for key in range(200, 300)])
    store.dataset.optimize.optimize_indices(num_indices_to_merge=0, index_names=[module.FTS_NAME])
    store.refresh()
    assert len(module._fts_segments(store)) == 2
    lexical, memory = LanceBM25(store), in_memory(store)
    for query in ZIPF_QUERIES:
        found, scores = lexical.search(query, top_k=300)
        expected, exact = memory.search(query, top_k=300)
        assert np.array_equal(found, expected)
        np.testing.assert_allclose(scores, exact, rtol=1e-5)
        assert sum(lexical.contributions(query, int(found[0])).values()) == pytest.approx(scores[0], rel=1e-5)


def test_newer_rows_score_under_the_statistics_of_the_index_whatever_the_filter(tmp_path: Path) -> None:
    captions, newer = zipf_captions(3, 300), zipf_captions(4, 60)
    store = fill(tmp_path, captions)
    store.add([stored(str(1000 + key), caption) for key, caption in enumerate(newer)])
    store.remove([pair_id("d", "s", str(key)) for key in range(40)])
    lexical = LanceBM25(store)
    then = Postings(np.arange(300), captions, tokenizer=Tokenizer()).statistics()
    ids, texts = store.captions()
    now = Postings(ids, texts, tokenizer=Tokenizer())
    odd = Subset(where="dataset = 'odd'", ids=np.sort(store.matching_ids("dataset = 'odd'")))
    for query in ZIPF_QUERIES:
        expected = now.scores(query.split(), then)
        np.testing.assert_allclose(lexical.scores(query, now.ids), expected, rtol=1e-6)
        found, scores = lexical.search(query, top_k=400)
        np.testing.assert_allclose(scores, expected[np.searchsorted(now.ids, found)], rtol=1e-6)
        among = dict(zip(*(part.tolist() for part in lexical.search(query, top_k=400, within=odd)), strict=True))
        assert among == {i: s for i, s in zip(found.tolist(), scores.tolist(), strict=True) if i in odd.ids}
        for pair, score in zip(found[::50].tolist(), scores[::50].tolist(), strict=True):
            assert sum(lexical.contributions(query, pair).values()) == pytest.approx(score, rel=1e-5)


def test_many_queries_at_once_are_the_same_queries(store: PairStore) -> None:
    lexical = LanceBM25(store)
    for query, (ids, scores) in zip(QUERIES, lexical.search_many(QUERIES, top_k=5), strict=True):
        expected, exact = lexical.search(query, top_k=5)
        assert np.array_equal(ids, expected)
        assert np.array_equal(scores, exact)


@pytest.mark.parametrize("top_k", [1, 10, 1000])
def test_a_part_of_a_larger_corpus_ranks_as_that_corpus_does(tmp_path: Path, top_k: int) -> None:
    # The other part has longer captions and other frequencies, so that the own order and the larger one's differ.
    captions, others = zipf_captions(5, 600), [f"{caption} w1 w2 w40" for caption in zipf_captions(6, 900, words=60)]
    store = fill(tmp_path, captions)
    lexical, everyone = LanceBM25(store), Postings(np.arange(1500), captions + others, tokenizer=Tokenizer())
    ids = np.array([pair_id("d", "s", str(key)) for key in range(600)])
    reordered = 0
    for query in ZIPF_QUERIES:
        corpus = everyone.statistics()
        exact = everyone.scores(query.split(), corpus)[:600]
        expected, scores = module._listed(ids, exact, top_k=top_k, within=None)
        found, got = lexical.search_among(corpus, query, top_k=top_k)
        np.testing.assert_allclose(got, scores, rtol=1e-12)
        assert np.array_equal(found, expected)
        reordered += not np.array_equal(found, lexical.search(query, top_k=top_k)[0])
    assert reordered or top_k == 1


def test_junk_in_captions_is_reported() -> None:
    report = report_captions(["a stock photo of a dog", "stock cat", "!!!", "stock cat", "a horse"])
    assert report.captions == 5
    assert report.without_words == report.duplicates == 1 / 5
    assert report.common_terms == {"stock": 3 / 5, "cat": 2 / 5}
    assert report_captions([]).common_terms == {}


def test_contributions_add_up(store: PairStore) -> None:
    query, pair = "cat dog dog zebra", pair_id("d", "s", "5")
    one = np.array([pair])
    for lexical in (LanceBM25(store), in_memory(store), TfIdf(*store.captions())):
        parts = lexical.contributions(query, pair)
        assert list(parts) == ["cat", "dog"]
        assert sum(parts.values()) == pytest.approx(lexical.scores(query, one)[0], rel=1e-6)
        assert lexical.contributions("zebra", pair) == {}


def test_rows_added_after_the_word_index_are_found_and_scored(store: PairStore) -> None:
    store.add([stored("100", "a zebra and a dog")])
    lexical = LanceBM25(store)
    new = pair_id("d", "s", "100")
    for query in ("zebra", "dog"):
        ids, scores = lexical.search(query, top_k=20)
        assert dict(zip(ids.tolist(), scores.tolist(), strict=True))[new] > 0


def test_removed_rows_never_return(store: PairStore) -> None:
    gone = pair_id("d", "s", "0")
    store.remove([gone])
    lexical = LanceBM25(store)
    assert gone not in lexical.search("red dog", top_k=20)[0]
    assert lexical.scores("red dog", np.array([gone])).tolist() == [0.0]


def test_a_rebuild_restores_parity_and_an_idle_one_does_nothing(store: PairStore) -> None:
    store.add([stored("100", "a red zebra")])
    store.remove([pair_id("d", "s", "0")])
    build_fts(store)
    ids, scores = LanceBM25(store).search("red dog", top_k=20)
    expected, exact = in_memory(store).search("red dog", top_k=20)
    assert np.array_equal(ids, expected)
    np.testing.assert_allclose(scores, exact, rtol=1e-6)
    before = store.version
    build_fts(store)
    assert store.version == before


def test_other_stop_words_rebuild_it(store: PairStore) -> None:
    build_fts(store, tokenizer=Tokenizer(stop_words=("red",)))
    lexical = LanceBM25(store)
    assert len(lexical.search("red", top_k=5)[0]) == 0
    assert list(lexical.contributions("red dog", pair_id("d", "s", "0"))) == ["dog"]


def test_nothing_to_index_is_fine(tmp_path: Path) -> None:
    store = PairStore.create(tmp_path, dim=2)
    build_fts(store)
    assert not has_fts(store)
    with pytest.raises(KnowledgeBaseError, match="no word index yet"):
        LanceBM25(store)
    none = np.array([], dtype=np.int64)
    for lexical in (RankBM25(none, []), TfIdf(none, []), RankBM25(np.array([3]), ["!"]), TfIdf(np.array([3]), ["!"])):
        assert len(lexical.search("dog", top_k=3)[0]) == 0


def test_tf_idf_by_hand() -> None:
    # idf = ln((1 + 2) / (1 + n)) + 1; "cat dog" against "dog": the angle between (i, 1) and (0, 1).
    lexical = TfIdf(np.array([1, 2]), ["cat dog", "dog"])
    ids, scores = lexical.search("dog", top_k=2)
    i = math.log(3 / 2) + 1
    assert ids.tolist() == [2, 1]
    np.testing.assert_allclose(scores, [1.0, 1 / math.hypot(i, 1)], rtol=1e-12)


def test_tf_idf_says_where_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TFIDF_LIMIT", 1)
    with pytest.raises(QueryError, match="has 2; use --by bm25"):
        TfIdf(np.array([1, 2]), ["a", "b"])


def test_an_unknown_id_is_refused(store: PairStore) -> None:
    with pytest.raises(KnowledgeBaseError, match="id 12345 is not in the knowledge base"):
        in_memory(store).scores("dog", np.array([12345]))
