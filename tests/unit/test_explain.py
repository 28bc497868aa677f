"""The contact sheet stands alone and escapes what it shows; why_not gives the reason that applies."""

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import PIL.Image
import pytest

from index.knowledge_base import KnowledgeBase
from index.records import Hit, ImageLocation, StoredPair, pair_id
from index.search.answer import Answer, Question, ask
from index.search.contact_sheet import Searched, write_contact_sheet
from index.search.explain import (
    Surroundings,
    describe_searcher,
    exact_difference,
    how_fused,
    searcher_facts,
    surroundings,
    term_scores,
    why_not,
    word_counts,
)
from index.search.fusion import FusionRule
from index.search.joined import JoinedKnowledgeBase
from index.search.lexical import build_fts
from index.search.pictures import open_picture
from index.search.retriever import Retriever, SearchResult
from index.search.searcher import exact_searcher
from index.search.trace import Stage
from index.store import PairStore
from tests.fakes import HashEmbedder, caption_of, draw

EVIL = "<script>alert('x')</script> & \"quotes\" $facts"


def hit(folder: Path, rank: int, **changes: Any) -> Hit:
    path = folder / f"{rank}.png"
    PIL.Image.new("RGB", (600, 300) if rank == 1 else (32, 32), (rank, 90, 200)).save(path)
    fields: dict[str, Any] = {
        "id": 10**17 + rank,
        "rank": rank,
        "score": 1.0 / rank,
        "clip": 0.25 / rank,
        "bm25": 12.5 / rank,
        "caption": f"caption {rank}",
        "dataset": "toys",
        "image": ImageLocation(uri=str(path)),
    }
    return Hit(**{**fields, **changes})


class Collector(HTMLParser):
    """Tags, links and bar widths of a page; fails on a page whose tags do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def sheet(
    folder: Path,
    found: list[Hit] | SearchResult,
    query: str = "a toy",
    *,
    around: Surroundings | None = None,
    **more: Any,
) -> str:
    """A page; `more` are fields of its answer or of its head."""
    path = folder / "out" / "sheet.html"
    result = found if isinstance(found, SearchResult) else SearchResult(hits=found, timings_ms={})
    head = Searched(**{name: more.pop(name) for name in ("kb", "command") if name in more})
    question = Question(label=query, image=more.pop("image", None))
    write_contact_sheet(path, Answer(question=question, result=result, **more), searched=head, around=around)
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone(tmp_path: Path) -> None:
    hits = [hit(tmp_path, rank) for rank in (1, 2, 3)]
    stages = [Stage(stage="vector", kept=7, ms=1.0)]
    page = sheet(tmp_path, SearchResult(hits=hits, timings_ms={"embed": 3.0}, stages=stages), kb="toys kb")
    parsed = Collector(page)
    assert parsed.tags.count("article") == 3
    assert len(parsed.sources) == 3
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert "url(" not in page
    assert re.search(r"\$[a-z_]", page) is None, "every place of the template is filled"
    for text in ("caption 2", str(10**17 + 3), "toys kb", "3.0 ms", "4.0 ms", "12.50", "0.1250"):
        assert text in page
    assert page.index("caption 1") < page.index("caption 2") < page.index("caption 3")


def test_pictures_are_kept_small_and_small_ones_exact(tmp_path: Path) -> None:
    import base64

    sources = Collector(sheet(tmp_path, [hit(tmp_path, 1), hit(tmp_path, 2)])).sources
    images = [PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert [image.size for image in images] == [(448, 224), (32, 32)]
    assert [image.format for image in images] == ["JPEG", "PNG"]
    assert images[1].getpixel((5, 5)) == (2, 90, 200)


def test_what_users_wrote_cannot_become_markup(tmp_path: Path) -> None:
    page = sheet(tmp_path, [hit(tmp_path, 1, caption=EVIL, dataset=EVIL)], query=EVIL, kb=EVIL, terms=[{EVIL: 1.0}])
    assert Collector(page).tags.count("script") == 2  # the page's own two
    assert page.count("$facts") == page.count("alert(") == 11
    assert "<script>alert" not in page


def test_bars_are_shares_of_the_best_hit(tmp_path: Path) -> None:
    page = sheet(tmp_path, [hit(tmp_path, 1), hit(tmp_path, 2), hit(tmp_path, 3, clip=-0.3)])
    assert re.findall(r'class="clip" style="width:([\d.]+)%', page) == ["100.0", "50.0", "0.0"]
    assert "-0.3000" in page


def test_a_component_not_asked_for_has_no_bar(tmp_path: Path) -> None:
    page = sheet(tmp_path, [hit(tmp_path, 1, bm25=None)])
    assert 'class="clip"' in page
    assert 'class="bm25"' not in page


def test_an_image_that_is_gone_does_not_stop_the_page(tmp_path: Path) -> None:
    gone = hit(tmp_path, 2, image=ImageLocation(uri=str(tmp_path / "gone.png")))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page = sheet(tmp_path, [hit(tmp_path, 1), gone, hit(tmp_path, 3, image=ImageLocation(uri=str(broken)))])
    assert page.count("The image cannot be read:<br>") == 2
    assert len(Collector(page).sources) == 1


def test_no_hits_and_a_query_by_image(tmp_path: Path) -> None:
    page = sheet(tmp_path, [], image=PIL.Image.new("RGB", (8, 8)))
    assert "Nothing found" in page
    assert len(Collector(page).sources) == 1


# why_not


def stored(key: str, caption: str, x: float, *, dataset: str = "toys", image: str | None = None) -> StoredPair:
    return StoredPair(
        id=pair_id("d", "s", key),
        dataset=dataset,
        source="/data",
        shard="s",
        digest="x",
        key=key,
        caption=caption,
        image=ImageLocation(uri="/data/s.tar", offset=0, size=1),
        sha256=image or key,
        width=1,
        height=1,
        vector=np.array([x, (1 - x * x) ** 0.5], dtype=np.float32),
    )


ASKED: dict[str, Any] = {"vector": np.array([1.0, 0.0], dtype=np.float32), "k": 2}


@pytest.fixture
def retriever(tmp_path: Path) -> Retriever:
    store = PairStore.create(tmp_path, dim=2)
    store.add([
        stored("best", "a red dog", 1.0),
        stored("twin", "a red dog", 0.9, image="best"),
        stored("second", "red", 0.8, dataset="birds"),
        stored("third", "a dog", 0.7),
        stored("last", "blue", 0.1),
    ])
    build_fts(store)
    return Retriever(store, exact_searcher(store))


def name(key: str) -> int:
    return pair_id("d", "s", key)


@pytest.mark.parametrize(
    ("key", "asked", "stage", "reason"),
    [
        ("nobody", {}, "store", "is not in the knowledge base: it was never added"),
        ("best", {"exclude": [name("best")]}, "excluded", "is excluded by the query itself"),
        ("twin", {"exclude_group_of": [name("best")]}, "excluded", "is excluded by the query itself"),
        ("second", {"dataset": "toys"}, "filter", "does not pass the filter .* dataset 'birds'"),
        ("best", {}, "hit", "is a hit, number 1 of 2"),
        ("twin", {}, "duplicates", f"the same image is shown already, as {name('best')}, hit number 1"),
        ("last", {}, "k", "4 pairs come before it and 2 were asked for"),
        ("last", {"by": "bm25"}, "candidates", "shares no word with the query"),
        ("last", {"by": "clip", "min_score": 0.5}, "threshold", "below the least score of 0.5"),
        ("last", {"by": "clip", "min_clip": 0.5}, "threshold", "below the least clip of 0.5"),
    ],
)
def test_the_stage_that_lost_it(retriever: Retriever, key: str, asked: dict[str, Any], stage: str, reason: str) -> None:
    told = why_not(retriever, name(key), "red dog", **{**ASKED, **asked})
    assert told.stage == stage
    assert re.search(reason, told.sentence)
    document = json.loads(json.dumps(told.to_json()))
    assert (document["id"], document["stage"], document["sentence"]) == (str(name(key)), stage, told.sentence)


def test_what_was_taken_down_is_not_what_was_never_there(retriever: Retriever) -> None:
    retriever.store.remove([name("third")])
    told = why_not(retriever, name("third"), "red dog", **ASKED)
    assert (told.stage, told.sentence.rpartition("it ")[2]) == ("store", "was taken down.")


def test_the_standing_is_told_in_full(retriever: Retriever) -> None:
    told = why_not(retriever, name("last"), "red dog", **ASKED)
    wanted = "When every pair is compared it is number 5 of 5; clip 0.1000 is number 5; no word of the query"
    assert wanted in told.sentence
    assert told.to_json()["rank"] == 5
    assert told.numbers == {"place": 5, "k": 2}
    standing = retriever.standing(name("third"), "red dog", vector=ASKED["vector"])
    assert standing is not None
    assert (standing.clip_rank, standing.rank, standing.of) == (4, 4, 5)
    assert standing.bm25_rank in (3, 4)


def test_what_is_too_like_the_hits_above_is_lost_to_diversity(retriever: Retriever) -> None:
    asked = {**ASKED, "by": "clip", "diversity": 0.7}
    kept = retriever.search("red dog", **asked).hits
    assert [hit.id for hit in kept] == [name("best"), name("last")]
    told = why_not(retriever, name("twin"), "red dog", **asked)
    assert told.stage == "duplicates"  # the copy of a hit is a copy first
    told = why_not(retriever, name("second"), "red dog", **{**asked, "exclude": [name("twin")]})
    assert told.stage == "diversity"
    assert "too like those above" in told.sentence


def test_beyond_the_depth_of_both_lists(tmp_path: Path) -> None:
    """110 pairs are nearer and have the words; the candidates are 100 of each list."""
    store = PairStore.create(tmp_path, dim=2)
    store.add([stored(str(n), "a red dog", 0.9 - n / 1000) for n in range(110)] + [stored("far", "red", 0.1)])
    build_fts(store)
    told = why_not(Retriever(store, exact_searcher(store)), name("far"), "red red red dog", **ASKED)
    assert told.stage == "candidates"
    assert "neither among the 100 best by vector nor among the 100 best by words" in told.sentence
    assert told.numbers == {"depths": {"vector": 100, "words": 100}}


class Blind:
    """A searcher that never finds one of its rows, as an approximate one may not."""

    def __init__(self, store: PairStore, hidden: int):
        everything = exact_searcher(store)
        self.ids, self.snapshot = everything.ids, store.high_water
        self._rest = everything.subset(self.ids[self.ids != hidden])

    def search(self, queries: np.ndarray, *, top_k: int, **_: Any) -> tuple[np.ndarray, np.ndarray]:
        return self._rest.search(queries, top_k=top_k)


def test_what_the_approximate_search_missed(tmp_path: Path) -> None:
    store = PairStore.create(tmp_path, dim=2)
    store.add([stored(str(n), "a dog", 1 - n / 10) for n in range(8)])
    build_fts(store)
    retriever = Retriever(store, Blind(store, hidden=name("1")))
    asked = {**ASKED, "by": "clip", "k": 4}
    told = why_not(retriever, name("1"), **asked)
    assert told.stage == "approximate"
    assert "did not come upon it; ask with --exact" in told.sentence
    assert told.to_json()["clip_rank"] == 2
    difference = exact_difference(retriever.search, None, **asked)
    assert [hit.id for hit in difference.exact.hits] == [name(str(n)) for n in (0, 1, 2, 3)]
    ways: list[bool] = []

    def counted(text: str | None, *, exact: bool, **asked: Any) -> SearchResult:
        ways.append(exact)
        return retriever.search(text, exact=exact, **asked)

    for is_warm, told in ((False, [False, True, False, True]), (True, [False, True])):
        ways.clear()
        exact_difference(counted, None, is_warm=is_warm, **asked)
        assert ways == told
    assert not difference.is_moot
    assert difference.vector_recall == 0.75
    assert [line for line, _ in difference.lines] == ["number 2 was not found", "in place of those, as number 4"]
    document = difference.to_json()
    assert document["recall"] == 0.75
    assert [(hit["id"], hit["rank"]) for hit in document["missed"]] == [(str(name("1")), 2)]
    assert [(hit["id"], hit["rank"]) for hit in document["extra"]] == [(str(name("4")), 4)]
    assert document["timings_ms"].keys() == {"exact", "approximate"}
    same = exact_difference(Retriever(store, exact_searcher(store)).search, None, **asked)
    assert (same.recall, same.missed, same.extra) == (1, [], [])


def test_the_words_of_a_hit_add_up_to_its_bm25(retriever: Retriever) -> None:
    hits = retriever.search("red red dog", **ASKED).hits
    terms = term_scores(retriever, "red red dog", hits)
    assert set(terms[0]) == {"red", "dog"}
    for hit, words in zip(hits, terms, strict=True):
        assert sum(words.values()) == pytest.approx(hit.bm25, rel=1e-5)
    assert term_scores(retriever, None, retriever.search(None, **ASKED).hits) == [{}, {}]


# The panel


@pytest.fixture
def base(tmp_path: Path) -> KnowledgeBase:
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    for number in range(6):
        kb.add([draw(number)], caption_of(number), metadata={"url": f"https://example.org/{number}", "license": "CC0"})
    kb.add([draw(1)], EVIL, metadata={"note": EVIL, "long": "x" * 9000})
    kb.build_search("exact")
    return kb


def panel_data(page: str) -> dict[str, Any]:
    """What the script reads."""
    (text,) = re.findall(r'<script type="application/json" id="pairs">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def test_the_panel_has_all_that_is_known(base: KnowledgeBase, tmp_path: Path) -> None:
    result = base.query("a green circle", k=3)
    around = surroundings(base, result.hits)
    terms = term_scores(base.retriever, "a green circle", result.hits)
    page = sheet(tmp_path, result, around=around, terms=terms, command="radt index query --kb kb")
    data = panel_data(page)
    assert data["command"] == "radt index query --kb kb"
    hit = result.hits[0]
    about, stored_pair = data["pairs"][str(hit.id)], base.show(hit.id)
    facts = dict(about["facts"])
    assert facts["sha256"] == stored_pair.sha256
    assert (facts["shard"], facts["key"], facts["size"]) == (stored_pair.shard, stored_pair.key, "32 x 32")
    assert list(about["metadata"]) == ["url", "license"]
    assert about["terms"] == pytest.approx(terms[0])
    assert [row["name"] for row in about["scores"]] == ["score", "clip", "bm25"]
    assert about["scores"][2]["text"].endswith(f"number {result.rank('words', hit.id)}")
    for one in result.hits:
        neighbors = data["pairs"][str(one.id)]["neighbors"]
        assert neighbors
        own = {*around.repeats[one.id], one.id}
        assert not own & {int(near["id"]) for near in neighbors}
        assert all(near["id"] in data["pairs"] for near in neighbors)
    shown = {str(one.id) for one in result.hits}
    assert all(("picture" in about) == (i not in shown) for i, about in data["pairs"].items())
    assert "number 1" in page


def test_the_panel_cannot_be_broken_by_what_users_wrote(base: KnowledgeBase, tmp_path: Path) -> None:
    result = base.query("circle quotes facts", k=7)
    evil = next(hit for hit in result.hits if hit.caption == EVIL)
    page = sheet(tmp_path, result, EVIL, around=surroundings(base, result.hits), command=EVIL)
    Collector(page)
    assert "<script>alert" not in page
    about = panel_data(page)["pairs"][str(evil.id)]
    assert (about["caption"], about["metadata"]["note"]) == (EVIL, EVIL)
    assert len(about["metadata"]["long"]) < 4100
    assert about["repeats"] == [{"id": str(next(hit.id for hit in base.search(caption_of(1), by="bm25", k=1)))}]


def test_several_knowledge_bases_are_explained_as_one(base: KnowledgeBase, tmp_path: Path) -> None:
    other = KnowledgeBase.create(tmp_path / "other", base.embedder)
    for number in range(3, 9):
        other.add([draw(number)], caption_of(number), dataset="others")
    other.build_search("exact")
    joined = JoinedKnowledgeBase([base, other])
    result = joined.query("circle number", k=9)
    around = surroundings(joined, result.hits)
    assert all(hit.id in around.pairs and around.neighbors[hit.id] for hit in result.hits)
    assert [one["pairs"] for one in searcher_facts(joined)] == [7, 6]
    page = sheet(tmp_path, result, around=around)
    assert dict(panel_data(page)["pairs"][str(result.hits[-1].id)]["facts"])["found in"] == result.hits[-1].kb
    assert exact_difference(joined.query, "circle number", k=9).recall == 1


def test_the_notes_of_a_page(base: KnowledgeBase, tmp_path: Path) -> None:
    result = base.query("a red circle", k=2)
    missing = why_not(base.retriever, int(base.store.matching_ids()[4]), "a red circle", k=2, result=result)
    exact = exact_difference(base.query, "a red circle", k=2)
    around = surroundings(base, result.hits, more=[missing.id])
    page = sheet(tmp_path, result, around=around, exact=exact, why_not=missing)
    assert "Compared with every pair: recall 1.00" in page
    assert f"Why not {missing.id}? Stage: {missing.stage}" in page
    assert html.escape(missing.sentence) in page
    assert [stage.stage for stage in result.stages] == re.findall(
        r"<li><span>(\w+)</span><span class=\"kept\">\d", page
    )
    nothing = base.query("a red circle", k=2, where="id < 0")
    assert "Fewer than asked for" in sheet(tmp_path, nothing)


def test_pictures_are_shown_as_the_camera_was_held(tmp_path: Path) -> None:
    held = PIL.Image.Exif()
    held[0x0112] = 6
    path = tmp_path / "photo.jpg"
    shown = hit(tmp_path, 2, image=ImageLocation(uri=str(path)))
    for exif, size in ((held.tobytes(), (40, 60)), (b"", (60, 40))):
        PIL.Image.new("RGB", (60, 40), "red").save(path, exif=exif)
        assert open_picture(shown).size == size


def test_fifty_hits_are_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((900, 600)).save(tmp_path / "photo.jpg")
    hits = [hit(tmp_path, rank, image=ImageLocation(uri=str(tmp_path / "photo.jpg"))) for rank in range(1, 51)]
    assert len(sheet(tmp_path, hits)) < 4_000_000


# What the head of a page and the panel say of the scores


def value_of(made: str) -> float:
    """The number that a line of `how_fused` comes to."""
    numbers = re.sub(r" by \w+| \(1 for the best candidate\)|,", "", made).replace("x", "*")
    assert re.fullmatch(r"[0-9.()+*/ -]+", numbers), numbers
    return float(eval(numbers))


@pytest.mark.parametrize("rule", get_args(FusionRule))
def test_a_fused_score_is_taken_apart(tmp_path: Path, rule: FusionRule) -> None:
    store = PairStore.create(tmp_path, dim=2)
    far = [stored(f"far{n}", "a red dog", 0.1 + n / 100) for n in range(5)]
    store.add([stored(str(n), "a dog" if n < 3 else "a cat", 0.9 - n / 1000) for n in range(110)] + far)
    build_fts(store)
    retriever = Retriever(store, exact_searcher(store))
    result = retriever.search("red dog", **{**ASKED, "by": "hybrid", "k": 10, "fusion": rule})
    for hit in result.hits:
        assert value_of(how_fused(hit, result, rule)) == pytest.approx(hit.score, abs=1e-9 if rule == "rrf" else 2e-4)
    if rule == "rrf":  # some are in one list only, and have no rank in the other
        assert any(result.rank("vector", hit.id) is None for hit in result.hits)
    alone = retriever.search("red dog", by="bm25")
    assert how_fused(alone.hits[0], alone, rule) == ""


def test_a_search_that_compares_all_cannot_have_missed_any(base: KnowledgeBase) -> None:
    assert exact_difference(base.query, "a red circle", k=2).is_moot
    assert "compares every pair here too" in exact_difference(base.query, "a red circle", k=2).summary
    assert "compares words alone" in exact_difference(base.query, "a red circle", k=2, by="bm25").summary


def test_many_rows_outside_the_searcher_are_told_with_what_folds_them_in() -> None:
    known = {"kind": "scann", "rows": 10, "recall_at_10": 0.95, "pairs": 1_000_000}
    assert describe_searcher({**known, "newer": 0}) == "1,000,000 pairs by scann, recall@10 0.950"
    assert describe_searcher({**known, "newer": 7}).endswith("; 7 newer ones compared one by one")
    assert "`radt index compact` folds them in" in describe_searcher({**known, "newer": 30_000})


def test_a_difference_that_is_not_the_searchers_is_told_as_such(tmp_path: Path) -> None:
    """The nearest has no word of the query; 100 that share a word are far from it, nearer by rank in a short list."""
    store = PairStore.create(tmp_path, dim=2)
    far = [stored(f"far{n}", "a dog", 0.5 + n / 1000) for n in range(150)]
    store.add([stored(str(n), "a cat", 0.99 - n / 1000) for n in range(300)] + far)
    build_fts(store)
    retriever = Retriever(store, exact_searcher(store))
    difference = exact_difference(retriever.search, "dog", **{**ASKED, "k": 10, "by": "hybrid"})
    assert difference.recall < difference.vector_recall == 1
    assert "of the nearest vectors it found 1.00" in difference.summary
    assert "among the best 100 of each list" in difference.summary
    assert all(re.fullmatch(r"number \d+ was number \d+|in place of .*", line) for line, _ in difference.lines)


def test_the_panel_names_the_words_that_a_caption_lacks(base: KnowledgeBase, tmp_path: Path) -> None:
    zeppelin, green = "a red circle left of a zeppelin", "a red circle left of a green circle"
    for text, asked, lacked in (
        (zeppelin, {"by": "bm25"}, {"left", "zeppelin"}),
        (zeppelin, {"by": "tfidf"}, set()),  # which tells no words
        (green, {"by": "bm25"}, {"left", "green"}),
        (green, {"by": "bm25", "decompose": "phrases"}, set()),  # of its own part of the prompt
    ):
        result = base.query(text, k=1, **asked)
        terms = term_scores(base.retriever, text, result.hits)
        words = word_counts(base.retriever, text, result)
        page = sheet(tmp_path, result, text, terms=terms, words=words, asked=asked)
        (about,) = panel_data(page)["pairs"].values()
        assert "red" in about["caption"]
        assert set(about["missing"]) == lacked
        assert ("<b>zeppelin</b> in none" in page) == (text == zeppelin)


# Many queries of one state


def test_what_is_held_is_of_one_state(base: KnowledgeBase, tmp_path: Path) -> None:
    other = KnowledgeBase.create(tmp_path / "other", base.embedder)
    other.add([draw(8)], caption_of(8))
    writer = KnowledgeBase.open(other.directory, base.embedder)
    for number, asked in enumerate((other, JoinedKnowledgeBase([base, other]))):
        before = len(asked)
        with asked.held():
            writer.add([draw(20 + number)], f"a zeppelin {number}")
            result = asked.query("zeppelin", k=20, exact=True)
            assert (result.matching, result.depth, len(asked)) == (before, before, before)
        assert asked.query("zeppelin", k=20).matching == before + 1


def test_what_is_held_and_deleted_meanwhile_is_asked_of_a_later_state(
    base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = KnowledgeBase.open(base.directory, base.embedder)
    search, failures = Retriever.search, [OSError("Not found: 1.lance")]

    def deleted(self: Retriever, *args: Any, **asked: Any) -> SearchResult:
        if failures:
            writer.add([draw(21)], "a zeppelin")
            raise failures.pop()
        return search(self, *args, **asked)

    monkeypatch.setattr(Retriever, "search", deleted)
    for asked in (base, JoinedKnowledgeBase([base])):
        with asked.held():
            answer = ask(asked, Question(label="zeppelin", text="zeppelin"), {"by": "bm25"})
        assert [hit.caption for hit in answer.result.hits] == ["a zeppelin"]
        assert answer.snapshot == asked.store.version


def test_the_depth_is_that_of_the_lists_that_were_fused(tmp_path: Path) -> None:
    """A hundred captions of one picture use up the first hundred candidates."""
    store = PairStore.create(tmp_path, dim=2)
    store.add(
        [stored(str(n), "a red dog", 0.9 - n / 1000, image="one") for n in range(150)] + [stored("x", "a cat", 0.1)]
    )
    build_fts(store)
    retriever = Retriever(store, exact_searcher(store))
    for k, depth in ((1, 100), (2, 400)):
        result = retriever.search("dog", **{**ASKED, "k": k})
        assert (len(result.hits), result.depth) == (k, depth)
    assert retriever.search("dog", **ASKED, exact=True).depth == 151  # fused over all pairs
    assert retriever.search("dog", **{**ASKED, "by": "clip", "k": 1}, exact=True).depth == 100
