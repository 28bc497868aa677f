"""What `radt generate` does: prompts to PNG files that carry their own records, and perhaps one sheet of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from index.errors import QueryError
from radt.neighbors import Neighbor, Reference
from radt.pipeline import GeneratedImage, OnStep, TextToImage, file_name, ignore
from radt.sheet import Picture, Row, Sheet, write_sheet

RETRIEVAL_ONLY = ("by", "fusion", "decompose", "diversity", "dataset", "where", "min_score", "exclude")


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One picture and the file it went to."""

    path: Path
    picture: GeneratedImage


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked for. `settings` are the fields of GenerateSettings that were named; the model has the others."""

    prompts: tuple[str, ...]
    n: int = 1
    seed: int = 0
    references: tuple[Reference, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def generate_files(
    request: Request,
    *,
    out: Path,
    sheet: Path | None = None,
    model: str | Path | None = None,
    kb: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    on_step: OnStep = ignore,
    say: Callable[[str], None] = lambda line: None,
) -> list[Drawn]:
    """The whole command: load, draw, save, and write a contact sheet where one is wanted."""
    kb = kb or None
    check_effect(request, has_kb=kb is not None)
    pipeline = TextToImage.load(model, kb=kb, device=device)
    if kb is None and not request.references:
        say("no knowledge base (--kb) and no --reference: drawing from the text alone")
    drawn = list(draw(pipeline, request, out, on_step=on_step))
    if sheet is not None:
        png, page = write_sheet(make_sheet(drawn, "Prompts, neighbours and pictures"), sheet)
        say(f"contact sheet: {png} and {page}")
    return drawn


def draw(pipeline: TextToImage, request: Request, out: Path, *, on_step: OnStep = ignore) -> Iterator[Drawn]:
    """Draw each prompt's pictures; each picture is on disk, whole, before the next is begun."""
    steps = pipeline.cascade.network_steps(pipeline.settings(**request.settings)) * request.n
    for place, prompt in enumerate(request.prompts):
        pictures = pipeline.stream(
            prompt,
            n=request.n,
            seed=request.seed,
            references=request.references,
            on_step=_shifted(on_step, place * steps, len(request.prompts)),
            **request.settings,
        )
        for number, picture in enumerate(pictures, start=place * request.n):
            yield Drawn(path=picture.save(out / file_name(number, prompt, picture.seed)), picture=picture)


def check_effect(request: Request, *, has_kb: bool) -> None:
    """Refuse what would be ignored: neighbours asked for where there are none to be had."""
    if has_kb:
        return
    idle = [name for name in RETRIEVAL_ONLY if request.settings.get(name) is not None]
    if request.settings.get("k") and not request.references:
        idle.insert(0, "k")
    if idle:
        raise QueryError(f"{', '.join(idle)} would have no effect without a knowledge base: name one with --kb")


def to_json(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """The document that `--json` prints: every picture, and the times of the whole command."""
    timings = {"retrieve": 0.0, "encode_neighbors": 0.0, "sample": 0.0}
    for _, group in _by_prompt(drawn):
        timings["retrieve"] += group[0].picture.timings_ms["retrieve"]
        timings["encode_neighbors"] += group[0].picture.timings_ms["encode_neighbors"]
        timings["sample"] += sum(each.picture.timings_ms["sample"] for each in group)
    images = [each.picture.to_json(each.path) for each in drawn]
    return {"images": images, "timings_ms": {name: round(value, 3) for name, value in timings.items()}}


def explain(drawn: Sequence[Drawn]) -> Iterator[str]:
    """Lines that say which pairs each prompt was drawn from, best first."""
    for prompt, group in _by_prompt(drawn):
        yield f"{prompt}: {'drawn from the text alone' if not group[0].picture.neighbors else 'drawn from'}"
        for neighbor in group[0].picture.neighbors:
            yield f"  {neighbor.id:>20}  {'  '.join(_scores(neighbor))}  {neighbor.caption}"


def make_sheet(drawn: Sequence[Drawn], title: str) -> Sheet:
    """A row a prompt: its neighbours and its pictures."""
    rows = tuple(
        Row(prompt=prompt, cells=(neighbor_pictures(group[0].picture), drawn_pictures([d.picture for d in group])))
        for prompt, group in _by_prompt(drawn)
    )
    return Sheet(title=title, subtitle=subtitle(drawn[0].picture), columns=("Neighbours", "Pictures"), rows=rows)


def subtitle(picture: GeneratedImage) -> str:
    """How it was drawn, in one line."""
    asked, origin = picture.settings, picture.record.origin
    is_found = any(neighbor.score is not None for neighbor in picture.neighbors)
    search = f", found by {asked.by}, decompose {asked.decompose}" if is_found else ""
    return (
        f"radt {origin.radt}, model {origin.model}, {asked.sampler} at {asked.steps} steps, "
        f"text {asked.text_guidance:g}, neighbours {asked.neighbor_guidance:g}, text share {asked.text_share:g}{search}"
    )


def neighbor_pictures(picture: GeneratedImage) -> tuple[Picture, ...]:
    """The neighbours for a sheet, as found rather than as small as the network saw them."""
    return tuple(
        Picture(image=neighbor.original or neighbor.image, lines=(neighbor.caption, *_scores(neighbor)))
        for neighbor in picture.neighbors
    )


def drawn_pictures(pictures: Sequence[GeneratedImage]) -> tuple[Picture, ...]:
    """Drawn pictures for a sheet."""
    return tuple(Picture(image=picture.image, lines=(f"seed {picture.seed}",)) for picture in pictures)


def _scores(neighbor: Neighbor) -> list[str]:
    """What it was found for, the score, what that was fused from, and the attention that the first picture paid."""
    paid = [] if neighbor.attention is None else [f"attention {neighbor.attention:.0%}"]
    if neighbor.score is None:
        return ["given by hand", *paid]
    components = {"clip": neighbor.clip, "bm25": neighbor.bm25}
    parts = [
        f"{name} {value:.2f}"
        for name, value in components.items()
        if value is not None and value != neighbor.score  # a search by one alone: its score is the component
    ]
    asked = [] if neighbor.part is None else [f"for {neighbor.part}"]
    return [*asked, f"score {neighbor.score:.4f}", *([", ".join(parts)] if parts else []), *paid]


def _by_prompt(drawn: Sequence[Drawn]) -> list[tuple[str, list[Drawn]]]:
    """Pictures of the same prompt that follow each other."""
    return [(prompt, list(group)) for prompt, group in groupby(drawn, key=lambda each: each.picture.prompt)]


def _shifted(on_step: OnStep, before: int, times: int) -> Callable[[int, int], None]:
    """One prompt's progress as a part of all prompts'."""
    return lambda done, total: on_step(before + done, total * times)
