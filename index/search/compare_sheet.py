"""The page of a comparison: what two sides found for the same queries, one row above the other."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.atomic import write_bytes
from index.search.compare import PERSISTENCE, Difference, Side
from index.search.page import filled
from index.search.pictures import picture

if TYPE_CHECKING:
    from index.records import Hit, StoredPair

_SHOWN = 40  # queries with pictures
_THUMBNAIL = 160  # pixels
_FACTS = {
    "queries": "queries",
    "identical": "identical",
    "disjoint": "nothing shared",
    "overlap_median": "overlap, median",
    "rbo_median": "rbo, median",
    "ms_median_a": "ms, median, A",
    "ms_median_b": "ms, median, B",
}


def write_compare_sheet(
    path: Path,
    a: Side,
    b: Side,
    differences: Sequence[Difference],
    *,
    names: tuple[str, str],
    summary: Mapping[str, Any],
) -> None:
    """Write one HTML file with everything inside it: the first 40 of `differences` with pictures.

    `names` say in words what the two sides are; `summary` is that of `summarize`.
    """
    shown = differences[:_SHOWN]
    pictures_a = _pictures(a, [hit for one in shown for hit in one.hits_a])
    pictures_b = _pictures(b, [hit for one in shown for hit in one.hits_b])
    sections = [_section(one, pictures_a, pictures_b) for one in shown]
    rest = len(differences) - len(shown)
    page = filled(
        "compare_sheet.html",
        title=f"{len(differences)} {'query' if len(differences) == 1 else 'queries'}, two answers",
        name_a=html.escape(names[0]),
        name_b=html.escape(names[1]),
        facts="".join(f"<li><b>{_fact(summary[name])}</b>{text}</li>\n" for name, text in _FACTS.items()),
        sections="".join(sections),
        persistence=str(PERSISTENCE),
        left_out=f"{rest:,} more queries are not drawn; --json has them all." if rest > 0 else "",
    )
    write_bytes(path, page.encode())


def _pictures(side: Side, hits: Sequence["Hit"]) -> dict[int, str]:
    """Every pair's picture once, however many queries found it."""
    ids = list(dict.fromkeys(hit.id for hit in hits))
    pairs: list[StoredPair] = side.kb.store.get(ids, thumbnails=True)
    return {pair.id: picture(pair, pixels=_THUMBNAIL) for pair in pairs}


def _section(one: Difference, pictures_a: Mapping[int, str], pictures_b: Mapping[int, str]) -> str:
    places_a = {b.id: a.rank for a, b in one.shared}
    places_b = {a.id: b.rank for a, b in one.shared}
    shift = "" if one.shift is None else f" &middot; score shift {one.shift:+.4f}"
    return (
        f"<section>\n<h2>{html.escape(one.query)}</h2>\n"
        f'<p class="measure">overlap {one.overlap:.2f} &middot; rbo {one.rbo:.2f}{shift} &middot; '
        f"{one.ms_a:.1f} ms and {one.ms_b:.1f} ms</p>\n"
        f"{_row('a', one.hits_a, places_b, pictures_a)}{_row('b', one.hits_b, places_a, pictures_b)}</section>\n"
    )


def _row(side: str, hits: Sequence["Hit"], elsewhere: Mapping[int, int], pictures: Mapping[int, str]) -> str:
    cards = "".join(_card(hit, elsewhere.get(hit.id), pictures.get(hit.id, "")) for hit in hits)
    listed = f"<ol>\n{cards}</ol>" if cards else '<p class="none">Nothing found.</p>'
    return f'<div class="row {side}"><span class="side {side}">{side.upper()}</span>{listed}</div>\n'


def _card(hit: "Hit", elsewhere: int | None, image: str) -> str:
    was = "" if elsewhere in (None, hit.rank) else f" &middot; there {elsewhere}"
    return (
        f"<li{' class=only' if elsewhere is None else ''}><figure>{image}</figure>"
        f'<p class="place">{hit.rank}{was} &middot; {hit.score:.4f}</p>'
        f'<p class="caption" title="{hit.id}: {html.escape(hit.caption)}">{html.escape(hit.caption)}</p></li>\n'
    )


def _fact(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
