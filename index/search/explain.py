"""Explain a query: a contact sheet of what it found, and why a pair that was expected is not among the hits."""

import base64
import html
import io
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from index.records import Hit

if TYPE_CHECKING:
    import PIL.Image

    from index.search.retriever import Retriever, Standing

_THUMBNAIL = 448  # pixels: twice the width of a card
_PIXELATED_BELOW = 96  # pictures this small are shown by their pixels


def write_contact_sheet(
    path: Path,
    query: str,
    hits: Sequence[Hit],
    *,
    timings_ms: Mapping[str, float] | None = None,
    kb: str = "",
    query_image: "PIL.Image.Image | None" = None,
    terms: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Write one HTML file with everything inside it: pictures in order, captions, every score.

    `terms`, from `Retriever.contributions`, says for each hit which words of the query earned its bm25.
    """
    template = Template(files("index.search").joinpath("contact_sheet.html").read_text(encoding="utf-8"))
    best = {name: max((value for hit in hits if (value := getattr(hit, name))), default=0.0) for name in _SCORES}
    cards = [_card(hit, best, terms[position] if terms else {}) for position, hit in enumerate(hits)]
    count = f"<b>{len(hits)}</b> {'hit' if len(hits) == 1 else 'hits'}"
    page = template.substitute(
        title=html.escape(query),
        query=html.escape(query),
        query_image=f'<img src="{_data_uri(query_image)}" alt="query">\n' if query_image is not None else "",
        facts=" &middot; ".join([count, *([f"from <b>{html.escape(kb)}</b>"] if kb else [])]),
        times=_times(timings_ms or {}),
        hits=f"<main>\n{''.join(cards)}</main>" if cards else '<p class="none">Nothing found.</p>',
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def why_not(
    retriever: "Retriever",
    pair_id: int,
    text: str | None = None,
    *,
    k: int = 5,
    min_score: float | None = None,
    exclude: Collection[int] = (),
    exact: bool = False,
    **asked: Any,
) -> str:
    """Say in a sentence or two why a pair is not among the hits of a query; the arguments are those of the query."""
    stored = retriever.store.get([pair_id])
    if not stored:
        return f"{pair_id} is not in the knowledge base: it was removed, or never added."
    if pair_id in exclude:
        return f"{pair_id} is excluded by the query itself."
    standing = retriever.standing(pair_id, text, **asked)
    if standing is None:
        return f"{pair_id} does not pass the filter of the query (it is of dataset {stored[0].dataset!r})."
    hits = retriever.search(text, k=k, min_score=min_score, exclude=exclude, exact=exact, **asked).hits
    for hit in hits:
        if hit.id == pair_id:
            return f"{pair_id} is a hit, number {hit.rank} of {len(hits)}. {_describe(standing)}"
    shown = [pair.id for pair in retriever.store.get([hit.id for hit in hits]) if pair.sha256 == stored[0].sha256]
    return f"{pair_id} is not a hit: {_reason(standing, k=k, min_score=min_score, shown=shown)}. {_describe(standing)}"


_SCORES = ("score", "clip", "bm25")


def _reason(standing: "Standing", *, k: int, min_score: float | None, shown: Sequence[int]) -> str:
    """The first that applies, from the most particular to the most general."""
    if shown:
        return f"the same image is shown already, as {shown[0]}"
    if min_score is not None and standing.score < min_score:
        return f"its score is below the least score of {min_score:g}"
    if standing.score == 0 and standing.bm25_rank is None and standing.clip is None:
        return "its caption shares no word with the query"
    if standing.rank <= k:
        return "the approximate search did not come upon it; ask with --exact"
    return f"{standing.rank - 1:,} pairs come before it and {k:,} were asked for"


def _describe(standing: "Standing") -> str:
    parts = [f"when every pair is compared it is number {standing.rank:,} of {standing.of:,}"]
    if standing.clip is not None:
        parts.append(f"clip {standing.clip:.4f} is number {standing.clip_rank:,}")
    if standing.bm25_rank is not None:
        parts.append(f"bm25 {standing.bm25:.4f} is number {standing.bm25_rank:,}")
    elif standing.bm25 is not None:
        parts.append("no word of the query is in its caption")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _card(hit: Hit, best: Mapping[str, float], terms: Mapping[str, float]) -> str:
    values = [(name, getattr(hit, name)) for name in _SCORES]
    # A single component is the score itself: one bar is enough.
    bars = "".join(_bar(name, value, best[name]) for name, value in values if value is not None)
    chips = "".join(f"<li>{html.escape(term)}<span>{value:.2f}</span></li>" for term, value in terms.items())
    return (
        f'<article>\n<figure><span class="rank">{hit.rank}</span>{_picture(hit)}</figure>\n<div class="body">\n'
        f'<p class="caption" title="{html.escape(hit.caption)}">{html.escape(hit.caption)}</p>\n'
        f"{f'<ul class=terms>{chips}</ul>' if chips else ''}<dl>{bars}</dl>\n"
        f'<p class="id">{html.escape(hit.dataset)}<br>{hit.id}</p>\n</div>\n</article>\n'
    )


def _bar(name: str, value: float, best: float) -> str:
    share = max(0.0, min(1.0, value / best)) if best > 0 else 0.0
    return (
        f'<dt>{name}</dt><div class="bar"><i class="{name}" style="width:{share:.1%}"></i></div>'
        f"<dd>{_number(value)}</dd>"
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _picture(hit: Hit) -> str:
    """The hit's image as a data URI, or a line that says it cannot be read: the sheet is written all the same."""
    try:
        image = hit.open_image()
    except (OSError, ValueError) as error:
        return f"<p>The image cannot be read:<br>{html.escape(str(error))}</p>"
    kind = ' class="small"' if max(image.size) < _PIXELATED_BELOW else ""
    return f'<img{kind} src="{_data_uri(image)}" alt="{html.escape(hit.caption)}" loading="lazy">'


def _data_uri(image: "PIL.Image.Image") -> str:
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # Small pictures are drawn by their pixels, so they must not be blurred by JPEG.
    kind = "PNG" if max(small.size) < 2 * _PIXELATED_BELOW else "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _times(timings_ms: Mapping[str, float]) -> str:
    total = sum(timings_ms.values())
    if not total:
        return ""
    parts = "".join(f'<i style="flex:{ms / total:.4f}" title="{html.escape(n)}"></i>' for n, ms in timings_ms.items())
    names = "".join(f"<li>{html.escape(name)} {ms:.1f} ms</li>" for name, ms in timings_ms.items())
    names += f'<li class="total">total {total:.1f} ms</li>'
    return f'<div class="times">{parts}</div>\n<ul class="legend">{names}</ul>\n'
