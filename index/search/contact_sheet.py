"""The page of a query: what it found in order, and behind every picture all that is known of it. One file, no network.

The cards are written here and stand without scripts. `contact_sheet.js` opens the panel of a pair from the JSON that
the page carries; it puts texts in as texts, so a caption cannot become markup there either.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.errors import UserError
from index.records import Hit, StoredPair
from index.search.answer import Answer
from index.search.explain import ExactDifference, Surroundings, describe_searcher, how_fused
from index.search.page import filled, page_file
from index.search.pictures import data_uri, open_picture, picture
from index.search.retriever import SearchResult
from index.search.words import Tokenizer

if TYPE_CHECKING:
    import PIL.Image

_THUMBNAIL = 448  # pixels: twice the width of a card
_SMALL = 96  # pixels of a picture that is no hit
_LONGEST = 4000  # characters of one value of the metadata
_SCORES = ("score", "clip", "bm25")
_SHORTEST = 0.05  # milliseconds, below which a clock did nothing
_PREPARING = ("embed", "decompose")  # clocks before the first stage; loading the model is not a part of a query


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """What was searched, for the head of a page, and how one goes on from there.

    `searchers` are `searcher_facts`. `repeat` is the shell command that asks the same, `command` the one to which
    `--id ID` is added.
    """

    kb: str = ""
    searchers: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    repeat: str = ""


def write_contact_sheet(
    path: Path, answer: Answer, *, searched: Searched | None = None, around: Surroundings | None = None
) -> None:
    """Write one HTML file with everything inside it: pictures in order, captions, every score, a panel for each.

    `around` is what lies around the hits.
    """
    searched, result, hits = searched or Searched(), answer.result, answer.result.hits
    around = around or Surroundings()
    all_terms = answer.terms or [{} for _ in hits]
    best = {name: max((value for hit in hits if (value := getattr(hit, name))), default=0.0) for name in _SCORES}
    cards = [
        _card(hit, best, earned, picture(around.pairs.get(hit.id, hit), pixels=_THUMBNAIL))
        for hit, earned in zip(hits, all_terms, strict=True)
    ]
    pairs = {str(pair.id): _about_pair(pair, around) for pair in around.pairs.values()}
    for hit, earned in zip(hits, all_terms, strict=True):
        about = pairs.get(str(hit.id), _about_hit(hit))
        found_in = [["found in", hit.kb]] if hit.kb is not None else []
        scores = _about_score(hit, best, earned, result)
        scores["missing"] = _missing(hit, earned, answer.words)
        scores["made"] = how_fused(hit, result, answer.asked.get("fusion", "rrf"))
        pairs[str(hit.id)] = {**about, **scores, "facts": found_in + about["facts"]}
    page = filled(
        "contact_sheet.html",
        title=answer.question.label,
        query_image=_query_image(answer.question.image),
        facts=_facts(answer, searched),
        stages=_stages(result),
        repeat=_command_line(searched.repeat),
        notes=_notes(answer, around),
        hits=f"<main>\n{''.join(cards)}</main>" if cards else '<p class="none">Nothing found.</p>',
        pairs=_script_json({"command": searched.command, "pairs": pairs}),
        script=page_file("contact_sheet.js"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


# Cards


def _card(hit: Hit, best: Mapping[str, float], terms: Mapping[str, float], image: str) -> str:
    values = [(name, getattr(hit, name)) for name in _SCORES]
    # A single component is the score itself: one bar is enough.
    bars = "".join(_bar(name, value, best[name]) for name, value in values if value is not None)
    chips = "".join(f"<li>{html.escape(term)}<span>{value:.2f}</span></li>" for term, value in terms.items())
    where = html.escape(hit.dataset if hit.kb is None else f"{hit.dataset} in {hit.kb}")
    part = f'<p class="part">for {html.escape(hit.part)}</p>\n' if hit.part else ""
    return (
        f'<article tabindex="0" role="button" aria-haspopup="dialog" data-id="{hit.id}">\n'
        f'<figure><span class="rank">{hit.rank}</span>{image}</figure>\n<div class="body">\n{part}'
        f'<p class="caption" title="{html.escape(hit.caption)}">{html.escape(hit.caption)}</p>\n'
        f"{f'<ul class=terms>{chips}</ul>' if chips else ''}<dl>{bars}</dl>\n"
        f'<p class="id">{where}<br>{hit.id}</p>\n</div>\n</article>\n'
    )


def _bar(name: str, value: float, best: float) -> str:
    return (
        f'<dt>{name}</dt><div class="bar"><i class="{name}" style="width:{_share(value, best):.1%}"></i></div>'
        f"<dd>{_number(value)}</dd>"
    )


def _share(value: float, best: float) -> float:
    return max(0.0, min(1.0, value / best)) if best > 0 else 0.0


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _query_image(image: "PIL.Image.Image | None") -> str:
    return "" if image is None else f'<img src="{data_uri(image, pixels=_THUMBNAIL)}" alt="query">\n'


# The head of the page


def _facts(answer: Answer, searched: Searched) -> str:
    """Lines under the title: what was searched, how it was asked, by whom, and how common the words are."""
    hits = len(answer.result.hits)
    what = [f"<b>{hits}</b> {'hit' if hits == 1 else 'hits'}"]
    what += [f"from <b>{html.escape(searched.kb)}</b>"] if searched.kb else []
    if answer.snapshot is not None:
        numbers = answer.snapshot if isinstance(answer.snapshot, tuple) else (answer.snapshot,)
        what.append(f"snapshot {' + '.join(map(str, numbers))}")
    parts = [f"<b>{html.escape(part)}</b>" for part in answer.result.parts]
    counts = [f"<b>{html.escape(word)}</b> {f'in {n:,}' if n else 'in none'}" for word, n in answer.words.items()]
    lines = [
        what,
        _options(answer.asked),
        [f"searched for {', '.join(parts)}, counted together below"] if len(parts) > 1 else [],
        [html.escape(describe_searcher(fact)) for fact in searched.searchers],
        ["words of the query in captions: " + ", ".join(counts)] if counts else [],
    ]
    return "".join(f'<p class="facts">{" &middot; ".join(line)}</p>\n' for line in lines if line)


def _options(asked: Mapping[str, Any]) -> list[str]:
    """What was asked for, but for what says nothing."""
    by = str(asked.get("by", ""))
    told = [f"by {by}, {asked['fusion']}" if by == "hybrid" and "fusion" in asked else f"by {by}"] if by else []
    silent = {"by", "fusion"} | {name for name in ("diversity", "decompose") if asked.get(name) in (0.0, "off")}
    for name, value in asked.items():
        if name not in silent and value is not None:
            text = ", ".join(value) if isinstance(value, list | tuple) else str(value)
            told.append(f"{name.replace('_', '-')} <b>{html.escape(text)}</b>")
    return told


def _command_line(command: str) -> str:
    """A shell command with a button that copies it."""
    if not command:
        return ""
    button = '<button type="button">copy</button>'
    return f'<div class="command repeat"><code>{html.escape(command)}</code>{button}</div>\n'


def _stages(result: SearchResult) -> str:
    """A waterfall: each stage at the time it ran, with how many candidates it left."""
    rows: list[tuple[str, int | None, float]] = [(name, None, result.timings_ms.get(name, 0.0)) for name in _PREPARING]
    rows += [(stage.stage, stage.kept, stage.ms) for stage in result.stages]
    rows = [row for row in rows if row[1] is not None or row[2] >= _SHORTEST]
    total = sum(ms for _, _, ms in rows)
    if not total:
        return ""
    most = max((kept for _, kept, _ in rows if kept is not None), default=0)
    lines, start = [], 0.0
    for name, kept, ms in rows:
        lines.append(_stage(name, kept, ms, start=start / total, share=ms / total, most=most))
        start += ms
    head = '<li class="total"><span>all</span><span></span><span></span><span></span>'
    return f'<ol class="stages">\n{"".join(lines)}{head}<span class="ms">{total:.1f} ms</span></li>\n</ol>\n'


def _stage(name: str, kept: int | None, ms: float, *, start: float, share: float, most: int) -> str:
    count = lane = ""
    if kept is not None:
        count = f"{kept:,}"
        width = math.log1p(kept) / math.log1p(most) if most else 0.0  # from millions to a handful
        lane = f'<span class="lane"><i class="count" style="width:{width:.1%}"></i></span>'
    return (
        f'<li><span>{html.escape(name)}</span><span class="kept">{count}</span>{lane or "<span></span>"}'
        f'<span class="lane"><i style="left:{start:.1%};width:{share:.1%}"></i></span>'
        f'<span class="ms">{ms:.1f} ms</span></li>\n'
    )


def _notes(answer: Answer, around: Surroundings) -> str:
    notes, exact, why_not = [], answer.exact, answer.why_not
    if answer.result.shortfall:
        notes.append(_note("Fewer than asked for", f"<p>{html.escape(answer.result.shortfall)}.</p>"))
    if exact is not None:
        notes.append(_note(f"Compared with every pair: recall {exact.recall:.2f}", _difference(exact)))
    if why_not is not None:
        pair = around.pairs.get(why_not.id)
        image = picture(pair, pixels=2 * _SMALL) if pair is not None else ""
        caption = f"<p>{html.escape(pair.caption)}</p>" if pair is not None else ""
        title = f"Why not {why_not.id}? Stage: {why_not.stage}"
        notes.append(_note(title, f"{caption}<p>{html.escape(why_not.sentence)}</p>", image))
    return "".join(notes)


def _note(title: str, content: str, image: str = "") -> str:
    return f'<div class="note">{image}<div><h2>{html.escape(title)}</h2>{content}</div></div>\n'


def _difference(exact: ExactDifference) -> str:
    sentence = html.escape(f"{exact.summary[0].upper()}{exact.summary[1:]}.")
    lines = [f"<li>{fate}: {html.escape(hit.caption)}</li>" for fate, hit in exact.lines]
    return f"<p>{sentence}</p>" + (f"<ul>{''.join(lines)}</ul>" if lines else "")


# What the panel of a pair shows


def _about_pair(pair: StoredPair, around: Surroundings) -> dict[str, Any]:
    hit_facts = [("dataset", pair.dataset), ("id", str(pair.id))]
    size = f"{pair.width} x {pair.height}" if pair.width is not None else None
    facts = [
        *hit_facts,
        *(("source", pair.source), ("shard", pair.shard), ("key", pair.key), ("size", size), ("sha256", pair.sha256)),
        *_place(pair),
    ]
    return {
        "caption": pair.caption,
        "facts": [[name, str(value)] for name, value in facts if value is not None],
        "metadata": _metadata(pair.metadata),
        "neighbors": [{"id": str(i), "score": score} for i, score in around.neighbors.get(pair.id, [])],
        "repeats": [{"id": str(i)} for i in around.repeats.get(pair.id, [])],
        # A hit's picture is on its card already.
        **({} if pair.id in around.neighbors else _small_picture(pair)),
    }


def _about_hit(hit: Hit) -> dict[str, Any]:
    """What a hit knows of itself."""
    facts = [("dataset", hit.dataset), ("id", str(hit.id)), *_place(hit)]
    return {
        "caption": hit.caption,
        "facts": [[name, str(value)] for name, value in facts if value is not None],
        "metadata": _metadata(hit.metadata),
    }


def _place(shown: Hit | StoredPair) -> Iterable[tuple[str, Any]]:
    return (("image", shown.image.uri or None), ("offset", shown.image.offset), ("bytes", shown.image.size))


def _about_score(
    hit: Hit, best: Mapping[str, float], terms: Mapping[str, float], result: SearchResult
) -> dict[str, Any]:
    ranks = {"score": hit.rank, "clip": result.rank("vector", hit.id), "bm25": result.rank("words", hit.id)}
    rows = [
        {
            "name": name,
            "kind": name,
            "share": _share(value, best[name]),
            "text": _number(value) + (f", number {ranks[name]:,}" if ranks[name] is not None else ""),
        }
        for name in _SCORES
        if (value := getattr(hit, name)) is not None
    ]
    return {"scores": rows, "terms": dict(terms)}


def _missing(hit: Hit, terms: Mapping[str, float], words: Iterable[str]) -> list[str]:
    """The words of the query, or of the part of it that a hit answers, that its caption does not have."""
    if hit.bm25 is None:
        return []
    asked = set(words) if hit.part is None else set(Tokenizer()(hit.part))
    return [word for word in words if word in asked and word not in terms]


def _metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Links and licences first; no value so long that it fills the page."""
    ordered = sorted(metadata, key=lambda name: not any(word in name.lower() for word in ("licen", "url")))
    return {name: _shortened(metadata[name]) for name in ordered if metadata[name] not in (None, "")}


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


def _small_picture(pair: StoredPair) -> dict[str, str]:
    with suppress(UserError, OSError, ValueError):
        return {"picture": data_uri(open_picture(pair), pixels=_SMALL)}
    return {}


def _script_json(value: Any) -> str:
    """JSON that no text in it can end: `</script>` and `<!--` need a `<`."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
