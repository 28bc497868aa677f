"""The contact sheet stands alone and escapes what it shows; why_not gives the reason that applies."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from index.records import Hit, ImageLocation, StoredPair, pair_id
from index.search.explain import why_not, write_contact_sheet
from index.search.lexical import build_fts
from index.search.retriever import Retriever
from index.search.searcher import exact_searcher
from index.store import PairStore

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


def sheet(folder: Path, hits: list[Hit], query: str = "a toy", **more: Any) -> str:
    path = folder / "out" / "sheet.html"
    write_contact_sheet(path, query, hits, **more)
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone(tmp_path: Path) -> None:
    hits = [hit(tmp_path, rank) for rank in (1, 2, 3)]
    page = sheet(tmp_path, hits, timings_ms={"embed": 3.0, "vector": 1.0}, kb="toys kb")
    parsed = Collector(page)
    assert parsed.tags.count("article") == 3
    assert len(parsed.sources) == 3
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert "url(" not in page
    assert "$" not in page, "every place of the template is filled"
    for text in ("caption 2", str(10**17 + 3), "toys kb", "embed 3.0 ms", "total 4.0 ms", "12.50", "0.1250"):
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
    assert "script" not in Collector(page).tags
    assert page.count("$facts") == page.count("alert(") == 8


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
    assert page.count("The image cannot be read") == 2
    assert len(Collector(page).sources) == 1


def test_no_hits_and_a_query_by_image(tmp_path: Path) -> None:
    page = sheet(tmp_path, [], query_image=PIL.Image.new("RGB", (8, 8)))
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


@pytest.mark.parametrize(
    ("key", "asked", "reason"),
    [
        ("nobody", {}, "is not in the knowledge base"),
        ("best", {"exclude": [pair_id("d", "s", "best")]}, "is excluded by the query itself"),
        ("second", {"dataset": "toys"}, "does not pass the filter .* dataset 'birds'"),
        ("best", {}, "is a hit, number 1 of 2"),
        ("twin", {}, f"the same image is shown already, as {pair_id('d', 's', 'best')}"),
        ("last", {}, "4 pairs come before it and 2 were asked for"),
        ("last", {"by": "bm25"}, "shares no word with the query"),
        ("last", {"by": "clip", "min_score": 0.5}, "below the least score of 0.5"),
    ],
)
def test_the_reason_that_applies(retriever: Retriever, key: str, asked: dict[str, Any], reason: str) -> None:
    assert re.search(reason, why_not(retriever, pair_id("d", "s", key), "red dog", **{**ASKED, **asked}))


def test_the_standing_is_told_in_full(retriever: Retriever) -> None:
    told = why_not(retriever, pair_id("d", "s", "last"), "red dog", **ASKED)
    assert "When every pair is compared it is number 5 of 5; clip 0.1000 is number 5; no word of the query" in told
    standing = retriever.standing(pair_id("d", "s", "third"), "red dog", vector=ASKED["vector"])
    assert standing is not None
    assert (standing.clip_rank, standing.rank, standing.of) == (4, 4, 5)
    assert standing.bm25_rank in (3, 4)


def test_an_approximate_search_that_missed_it_says_so(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    search, best = retriever.search, pair_id("d", "s", "best")

    def blind(*args: Any, **kwargs: Any) -> Any:
        return search(*args, **{**kwargs, "exclude": [best, pair_id("d", "s", "twin")]})

    monkeypatch.setattr(retriever, "search", blind)
    assert "did not come upon it; ask with --exact" in why_not(retriever, best, "red dog", **ASKED)
