"""Several knowledge bases searched as one, against one that holds it all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from index.cli import make_app
from index.errors import KnowledgeBaseError, QueryError
from index.knowledge_base import KnowledgeBase
from index.records import Hit, ImageLocation, StoredPair, pair_id
from index.search import view
from index.search.joined import JoinedKnowledgeBase
from index.search.retriever import Retriever
from tests.fakes import HashEmbedder

EMBEDDER = HashEmbedder()
PAIRS = 240


def stored(number: int, *, dataset: str = "d") -> StoredPair:
    """Captions of a few to many words by Zipf's law; a vector near the caption's, so that text finds images."""
    generator = np.random.default_rng(number)
    words = [f"w{min(int(n), 90)}" for n in generator.zipf(1.4, size=2 + number % 11)]
    caption = " ".join([*words, *(["long", "and", "winding"] if number % 3 == 0 else [])])
    vector = EMBEDDER.texts([caption])[0] + 0.3 * generator.normal(size=EMBEDDER.dim) / np.sqrt(EMBEDDER.dim)
    key = str(number)
    return StoredPair(
        id=pair_id(dataset, "s", key),
        dataset="even" if number % 2 == 0 else "odd",
        source="/data",
        shard="s",
        digest="x",
        key=key,
        caption=caption,
        image=ImageLocation(uri="/data/s.tar", offset=number, size=1),
        sha256=f"{number:064d}",
        width=100 + number,
        height=1,
        vector=(vector / np.linalg.norm(vector)).astype(np.float32),
    )


def fill(folder: Path, numbers: Any, *, indexed: bool = True) -> KnowledgeBase:
    base = KnowledgeBase.create(folder, EMBEDDER)
    base.store.add([stored(number) for number in numbers])
    if indexed:
        base.build_search("exact")
    return base


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBase:
    return fill(tmp_path_factory.mktemp("whole"), range(PAIRS))


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> JoinedKnowledgeBase:
    """Parts of unlike size and unlike captions: every third pair, the long ones, is in the second."""
    folder = tmp_path_factory.mktemp("parts")
    fill(folder / "a", [n for n in range(PAIRS) if n % 3])
    fill(folder / "b", [n for n in range(0, PAIRS, 3) if n % 2])
    fill(folder / "c", range(0, PAIRS, 6))
    return JoinedKnowledgeBase.open([folder / name for name in "abc"], EMBEDDER)


def facts(hits: list[Hit]) -> list[tuple[Any, ...]]:
    return [(hit.rank, hit.id, hit.caption, hit.dataset) for hit in hits]


def same(got: list[Hit], expected: list[Hit]) -> None:
    assert facts(got) == facts(expected)
    for name in ("score", "clip", "bm25"):
        ours, theirs = ([getattr(hit, name) for hit in hits] for hits in (got, expected))
        if theirs and theirs[0] is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_it_follows_the_searcher_of_every_part(tmp_path: Path) -> None:
    """One is built anew, which leaves no trace in the table."""
    parts = [
        fill(tmp_path / name, numbers, indexed=False) for name, numbers in (("a", range(40)), ("b", range(40, 60)))
    ]
    parts[0].build_search("lance")
    joined = JoinedKnowledgeBase.open([tmp_path / "a", tmp_path / "b"], EMBEDDER)
    expected = facts(joined.search("w2 w1", k=9, by="clip", exact=True))
    before, version = joined.retriever, parts[0].store.version
    assert joined.retriever is before
    parts[0].build_search("lance", recall=0.9)
    assert parts[0].store.version == version
    assert joined.retriever is not before
    assert facts(joined.search("w2 w1", k=9, by="clip")) == expected
    assert joined.parts[0].manifest.searcher == parts[0].manifest.searcher
    parts[1].store.add([stored(99)])
    assert len(joined.search("w2", k=99, by="clip")) == 61


def test_what_a_compaction_took_away_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [fill(tmp_path / name, numbers) for name, numbers in (("a", range(9)), ("b", range(9, 20)))]
    joined = JoinedKnowledgeBase.open([tmp_path / "a", tmp_path / "b"], EMBEDDER)
    search, failures = Retriever.search, iter([True, False, True])

    def sometimes(self: Retriever, *args: Any, **kwargs: Any) -> Any:
        if next(failures):
            raise OSError("Not found: data/1.lance")
        return search(self, *args, **kwargs)

    assert joined.retriever is joined.retriever
    parts[1].store.add([stored(30)])
    monkeypatch.setattr(Retriever, "search", sometimes)
    refresh = KnowledgeBase.refresh
    monkeypatch.setattr(KnowledgeBase, "refresh", lambda self: None)  # the other writes just after this one has looked
    monkeypatch.setattr(KnowledgeBase, "is_outdated", lambda self: refresh(self) or self.store.count() == 12)
    assert len(joined.search("w2", k=99, by="clip")) == 21
    monkeypatch.setattr(KnowledgeBase, "is_outdated", lambda self: False)
    with pytest.raises(OSError, match="Not found"):
        joined.search("w2")


QUERIES = ["w2 w1 w3", "w40 winding w2", "nowhere"]


@pytest.mark.parametrize("by", ["clip", "bm25", "tfidf", "hybrid"])
@pytest.mark.parametrize("exact", [False, True])
def test_it_finds_what_one_knowledge_base_with_everything_finds(
    joined: JoinedKnowledgeBase, whole: KnowledgeBase, by: str, exact: bool
) -> None:
    for query in QUERIES:
        same(joined.search(query, k=7, by=by, exact=exact), whole.search(query, k=7, by=by, exact=exact))


@pytest.mark.parametrize(
    "asked",
    [
        {"fusion": "sum"},
        {"fusion": "product", "k": 20},
        {"where": "width >= 200"},
        {"dataset": "odd", "by": "bm25"},
        {"where": "width < 110", "dataset": "even"},
        {"min_score": 0.025},
        {"k": PAIRS},
        {"by": "bm25", "k": 100},
        {"diversity": 0.5},
        {"decompose": "phrases"},
        {"decompose": "terms"},
        {"min_clip": 0.4, "min_bm25": 1.0},
        {"where": "width < 0"},
        {"dataset": ["odd", "even"], "where": "width > 300"},
        {"exclude_group_of": [stored(7).id]},
        {"exclude": [stored(number).id for number in range(0, PAIRS, 5)]},
    ],
    ids=str,
)
def test_whatever_is_asked(joined: JoinedKnowledgeBase, whole: KnowledgeBase, asked: dict[str, Any]) -> None:
    for query in QUERIES:
        same(joined.search(query, **asked), whole.search(query, **asked))


@pytest.mark.parametrize("limit", [0, 1000], ids=["by Lance", "in memory"])
def test_many_at_once(
    joined: JoinedKnowledgeBase, whole: KnowledgeBase, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "_IN_MEMORY_WORDS", limit)
    for got, expected in zip(
        joined.retriever.search_many(QUERIES, k=6), whole.retriever.search_many(QUERIES, k=6), strict=True
    ):
        same(got, expected)


@pytest.mark.parametrize("where", [None, "width < 110", "dataset = 'odd'"])
def test_nearest(joined: JoinedKnowledgeBase, whole: KnowledgeBase, where: str | None) -> None:
    vectors = EMBEDDER.texts(QUERIES)
    for k, exclude in ((4, None), (PAIRS + 1, [[stored(number).id] for number in range(len(QUERIES))])):
        ours, theirs = (each.retriever.nearest(vectors, k=k, where=where, exclude=exclude) for each in (joined, whole))
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)


def test_standing_and_contributions(joined: JoinedKnowledgeBase, whole: KnowledgeBase) -> None:
    ids = [stored(number).id for number in range(0, PAIRS, 17)]
    for pair in ids:
        ours, theirs = joined.retriever.standing(pair, "w2 long"), whole.retriever.standing(pair, "w2 long")
        assert ours is not None
        assert theirs is not None
        assert (ours.rank, ours.of, ours.bm25_rank) == (theirs.rank, theirs.of, theirs.bm25_rank)
    for ours_, theirs_ in zip(
        joined.retriever.contributions("w2 long w2", ids), whole.retriever.contributions("w2 long w2", ids), strict=True
    ):
        assert ours_ == pytest.approx(theirs_, rel=1e-5)


def test_a_hit_says_where_it_was_found(joined: JoinedKnowledgeBase) -> None:
    hits = joined.search("w1 w2 long", k=PAIRS)
    assert {Path(hit.kb or "").name for hit in hits} == {"a", "b", "c"}
    for hit in hits:
        assert hit.to_json()["kb"] == hit.kb
        assert KnowledgeBase.open(hit.kb or "", EMBEDDER).show(hit.id).caption == hit.caption
    assert "kb" not in replace(hits[0], kb=None).to_json()


def test_sizes_are_added_up(joined: JoinedKnowledgeBase, whole: KnowledgeBase) -> None:
    assert len(joined) == PAIRS
    stats = joined.stats()
    assert stats["datasets"] == whole.stats()["datasets"]
    assert [part["pairs"] for part in stats["parts"]] == [len(part) for part in joined.parts]
    pair = stored(6).id
    assert np.array_equal(joined.show(pair).vector, whole.show(pair).vector)
    with pytest.raises(QueryError, match="no pair 5 in "):
        joined.show(5)


def test_a_pair_that_several_have_counts_once_and_as_the_first(tmp_path: Path) -> None:
    first = fill(tmp_path / "a", range(40))
    second = fill(tmp_path / "b", range(20, 60))
    changed = replace(stored(30), caption="w1 another caption")
    first.store.add([changed])
    both = JoinedKnowledgeBase([first, second])
    assert len(both) == 60
    for by in ("clip", "bm25", "hybrid"):
        hits = both.search("w1 w2 long", k=60, by=by)
        assert len({hit.id for hit in hits}) == len(hits) >= 40
        assert {hit.kb for hit in hits if hit.id in second.store.matching_ids()} == {
            str(first.directory),
            str(second.directory),
        }
    assert next(hit.caption for hit in both.search("another caption", k=1, by="bm25")) == "w1 another caption"


def test_one_picture_in_two_parts_is_shown_once(tmp_path: Path) -> None:
    first, twin = stored(1), replace(stored(2), sha256=stored(1).sha256)
    parts = []
    for name, pair in (("a", first), ("b", twin)):
        base = KnowledgeBase.create(tmp_path / name, EMBEDDER)
        base.store.add([pair])
        parts.append(base)
    both = JoinedKnowledgeBase(parts)
    assert len(both.search(first.caption, k=5)) == 1
    assert both.search(first.caption, k=5, exclude_group_of=[first.id]) == []


def test_changes_in_a_part_are_seen(tmp_path: Path) -> None:
    first, second = fill(tmp_path / "a", range(20)), fill(tmp_path / "b", range(20, 40))
    both = JoinedKnowledgeBase([first, second])
    query = stored(25).caption
    assert both.search(query, k=1)[0].id == stored(25).id
    other = KnowledgeBase.open(second.directory, EMBEDDER)
    other.remove([stored(25).id])
    assert stored(25).id not in {hit.id for hit in both.search(query, k=40)}
    other.store.add([replace(stored(50), caption="zebra")])
    assert both.search("zebra", k=1, by="bm25")[0].id == stored(50).id


def test_what_a_filter_leaves_of_a_part_follows_what_the_others_have(tmp_path: Path) -> None:
    first, second = fill(tmp_path / "a", range(20)), fill(tmp_path / "b", range(10, 30))
    both = JoinedKnowledgeBase([first, second])
    asked: dict[str, Any] = {"k": 60, "by": "clip", "where": "dataset = 'even'"}
    assert {hit.id for hit in both.search("w1", **asked)} == {stored(n).id for n in range(0, 30, 2)}
    assert {hit.id for hit in second.search("w1", **asked)} == {stored(n).id for n in range(10, 30, 2)}
    first.remove([stored(12).id])  # the second has it still, and its own rows have not changed
    assert {hit.id for hit in both.search("w1", **asked)} == {stored(n).id for n in range(0, 30, 2)}


def test_a_part_without_a_word_index_is_searched_all_the_same(tmp_path: Path, whole: KnowledgeBase) -> None:
    fill(tmp_path / "a", range(0, PAIRS, 2))
    fill(tmp_path / "b", range(1, PAIRS, 2), indexed=False)
    both = JoinedKnowledgeBase.open([tmp_path / "a", tmp_path / "b"], EMBEDDER)
    for query in QUERIES:
        same(both.search(query, k=5), whole.search(query, k=5))


def test_an_empty_part_changes_nothing(tmp_path: Path, whole: KnowledgeBase) -> None:
    fill(tmp_path / "all", range(PAIRS))
    both = JoinedKnowledgeBase([
        KnowledgeBase.create(tmp_path / "none", EMBEDDER),
        KnowledgeBase.open(tmp_path / "all"),
    ])
    both.embedder = EMBEDDER
    both = JoinedKnowledgeBase.open([tmp_path / "none", tmp_path / "all"], EMBEDDER)
    same(both.search("w1 w7", k=5), whole.search("w1 w7", k=5))


def test_vectors_of_two_models_are_not_compared(tmp_path: Path) -> None:
    parts = [fill(tmp_path / name, range(3)) for name in "ab"]
    odd = KnowledgeBase.create(tmp_path / "odd", HashEmbedder(salt="x"))
    with pytest.raises(KnowledgeBaseError, match="odd was made by the model hash-32x, and the others by hash-32"):
        JoinedKnowledgeBase([odd, *parts])
    with pytest.raises(KnowledgeBaseError, match="is named 2 times"):
        JoinedKnowledgeBase([parts[0], KnowledgeBase.open(parts[0].directory)])
    with pytest.raises(KnowledgeBaseError, match="at least one"):
        JoinedKnowledgeBase([])


def test_the_command_takes_several(joined: JoinedKnowledgeBase) -> None:
    places = [word for part in joined.parts for word in ("--kb", part.name)]
    args = ["query", "w1 long", *places, "--by", "bm25", "--dataset", "odd", "--dataset", "even", "--json"]
    answer = CliRunner().invoke(make_app(), args)
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document["kb"] == [part.name for part in joined.parts]
    assert document["snapshot"] == list(joined.store.version)
    expected = joined.search("w1 long", by="bm25")
    assert [(hit["id"], hit["kb"]) for hit in document["hits"]] == [(str(hit.id), hit.kb) for hit in expected]
