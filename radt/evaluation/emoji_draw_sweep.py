"""EmojiDrawBench over settings: points of a sweep, each drawn for prompts of every kind and kept as it is done.

A sweep changes one thing: how many neighbours (`k`), how much of the guidance is the text's (`text-share`), what
neighbours are found by (`by`), or which neighbours there are (`neighbors`); `arms` is with, without, and one wrong.
Noise differs between prompts and is the same in every point. A point's prompts of one kind are one file in the folder
of results: a sweep that was killed goes on behind the last of them, and one that would be another starts anew.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from index.atomic import write_bytes
from index.config import digest, to_dict
from index.errors import QueryError
from radt.copying import WARN_ABOVE, copy_similarity
from radt.corpora.emoji import GlyphRenderer, load_entities
from radt.corpora.scenes import Glyphs
from radt.evaluation.emoji_draw import (
    Shown,
    check,
    class_of,
    found_emoji,
    judge_facts,
    kb_facts,
    mislead,
    show_classes,
    show_rendition,
)
from radt.evaluation.emoji_draw_kinds import (
    BenchKind,
    Outcome,
    Pictures,
    Prompt,
    judge,
    plan_prompts,
    shares,
    true_pictures,
    with_intervals,
)
from radt.evaluation.emoji_recognizer import EmojiRecognizer
from radt.neighbors import neighbors_of, with_pictures_of
from radt.pipeline import DrawRequest, TextToImage
from radt.resizing import Size
from radt.settings import By, GenerateSettings

if TYPE_CHECKING:
    from radt.evaluation.emoji_draw import AnyKnowledgeBase

Sweep: TypeAlias = Literal["arms", "k", "text-share", "by", "neighbors", "new-entity"]
Source: TypeAlias = Literal["found", "none", "one_wrong", "swapped", "removed", "by_hand", "by_hand_one_wrong"]
OnUnit: TypeAlias = Callable[[str, int, int], None]  # what is drawn, network steps done, of how many

SWEEP_K = (0, 1, 2, 4, 8)
SWEEP_TEXT_SHARE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SWEEP_BY: tuple[By, ...] = ("clip", "bm25", "hybrid")
UNITS = "points"  # the folder of what is kept
ROWS_KEPT = 12  # prompts a sheet
JUDGING = 5  # goes up whenever reading or judging a picture changes, so that what was judged before is drawn anew


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One setting of a sweep. `source` says where its neighbours come from, `x` where it stands on a curve's axis."""

    name: str
    source: Source
    settings: GenerateSettings
    x: float | None = None
    kb: str | None = None  # which state of the knowledge base, where a sweep makes several


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawn:
    """The pictures of one point and one kind, and what they were drawn from."""

    pictures: Pictures
    shown: tuple[tuple[Shown, ...], ...]
    outcomes: tuple[Outcome, ...]


def ignore_unit(what: str, done: int, total: int) -> None:
    """The default `on_unit`: nobody is watching."""


def plan_points(sweep: Sweep, settings: GenerateSettings) -> list[Point]:
    """The points of a sweep around these settings."""
    if sweep == "k":
        return [
            Point(name=f"k={k}", x=k, source="found" if k else "none", settings=replace(settings, k=k or settings.k))
            for k in SWEEP_K
        ]
    if sweep == "text-share":
        if settings.guidance != "interleaved" or settings.fast:
            raise QueryError(
                "the sweep over text-share needs --guidance interleaved and no --fast: else there is no share"
            )
        return [
            Point(name=f"text-share={eta:g}", x=eta, source="found", settings=replace(settings, text_share=eta))
            for eta in SWEEP_TEXT_SHARE
        ]
    if sweep == "by":
        return [Point(name=f"by={by}", source="found", settings=replace(settings, by=by)) for by in SWEEP_BY]
    if sweep == "neighbors":
        sources: tuple[Source, ...] = (
            "by_hand",
            "found",
            "by_hand_one_wrong",
            "one_wrong",
            "swapped",
            "removed",
            "none",
        )
        return [Point(name=source, source=source, settings=settings) for source in sources]
    if sweep == "new-entity":
        return [Point(name=name, source="found", settings=settings, kb=name) for name in ("before", "after")]
    named: dict[str, Source] = {
        "with_retrieval": "found",
        "without_retrieval": "none",
        "with_one_wrong": "one_wrong",
    }
    return [Point(name=name, source=source, settings=settings) for name, source in named.items()]


class KindsBench:
    """Prompts of several kinds and the recogniser, made once and used for any number of points.

    ModelError where the recogniser lacks a class that is asked for.
    """

    def __init__(self, prompts: Sequence[Prompt], glyphs: Glyphs, recognizer: EmojiRecognizer, *, size: int):
        recognizer.check_knows(class_id for prompt in prompts for class_id in prompt.class_ids)
        self.prompts, self.glyphs, self.recognizer, self.size = tuple(prompts), glyphs, recognizer, size
        self.kinds: tuple[BenchKind, ...] = tuple(dict.fromkeys(prompt.kind for prompt in prompts))

    @classmethod
    def prepare(
        cls,
        recognizer: EmojiRecognizer,
        *,
        kinds: Sequence[BenchKind],
        n: int,
        seed: int,
        size: int,
        font: str | Path | None = None,
    ) -> "KindsBench":
        """Plan `n` prompts of each kind among all that the font draws; `size` is the side of the model's pictures."""
        glyphs = GlyphRenderer(font)
        drawn = [entity for entity in load_entities() if glyphs.draws(entity)]
        return cls(plan_prompts(drawn, kinds, n=n, seed=seed), glyphs, recognizer, size=size)

    def of_kind(self, kind: BenchKind) -> tuple[Prompt, ...]:
        """The prompts of one kind."""
        return tuple(prompt for prompt in self.prompts if prompt.kind == kind)

    @cached_property
    def truths(self) -> dict[BenchKind, Pictures]:
        """The scenes as they should look."""
        return {kind: true_pictures(self.of_kind(kind), self.glyphs, self.size) for kind in self.kinds}

    @cached_property
    def ceiling(self) -> dict[str, dict[str, float]]:
        """What the measure gives to the true scenes, by kind and over `all`: no model can do better, but by luck."""
        found = {kind: judge(self.recognizer, self.of_kind(kind), self.truths[kind]) for kind in self.kinds}
        prompts = [prompt for kind in self.kinds for prompt in self.of_kind(kind)]
        outcomes = [outcome for kind in self.kinds for outcome in found[kind]]
        return {"all": shares(prompts, outcomes)} | {
            kind: shares(self.of_kind(kind), found[kind]) for kind in self.kinds
        }

    def glyph_digest(self, prompts: Sequence[Prompt]) -> str:
        """Changes with the font's picture of any entity that is asked for or put in a neighbour's place."""
        found = hashlib.sha256()
        for position in sorted({each.position for prompt in prompts for each in (*prompt.entities, prompt.wrong)}):
            glyph = self.glyphs[position]
            found.update(f"{position} {glyph.size} {glyph.mode} ".encode() + glyph.tobytes())
        return found.hexdigest()

    def neighbors(self, model: TextToImage, point: Point, prompts: Sequence[Prompt]) -> list[tuple[Shown, ...]]:
        """What each prompt is drawn from at a point."""
        if point.source == "none":
            return [() for _ in prompts]
        if point.source.startswith("by_hand"):
            rows = [self._by_hand(model, prompt, point.settings.k) for prompt in prompts]
        else:
            kb = check(model, point.settings)
            excluded = _ids_by_class(kb) if point.source == "removed" else {}
            rows = show_classes(kb, [_retrieve(model, point, prompt, excluded) for prompt in prompts])
            if point.source != "removed" and point.kb is None:  # where the entity is not there, nothing may be found
                rows = found_emoji(kb, rows)
        if point.source == "swapped":
            return [swap(own, other, model.size) for own, other in zip(rows, [*rows[1:], *rows[:1]], strict=True)]
        if point.source.endswith("one_wrong"):
            return [mislead(self.glyphs, prompt, row, model.size) for prompt, row in zip(prompts, rows, strict=True)]
        return rows

    def _by_hand(self, model: TextToImage, prompt: Prompt, k: int) -> tuple[Shown, ...]:
        """So many pictures of the corpus of the asked entities, in turn."""
        several = len(prompt.entities)
        return tuple(
            show_rendition(self.glyphs, prompt.entities[number % several], number // several, model.size)
            for number in range(k)
        )

    def draw(self, model: TextToImage, point: Point, kind: BenchKind, on_unit: OnUnit) -> tuple[Drawn, float, float]:
        """Pictures of one kind at one point, judged; the seconds that retrieval and drawing took."""
        prompts = self.of_kind(kind)
        start = time.perf_counter()
        rows = self.neighbors(model, point, prompts)
        found = time.perf_counter()
        requests = [
            DrawRequest(prompt=prompt.text, neighbors=[each.neighbor for each in row], seed=prompt.seed)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        what = f"{point.name}, {kind}"
        pictures = np.stack([
            picture.numpy()
            for picture in model.draw_many(
                requests, settings=point.settings, on_step=lambda done, total: on_unit(what, done, total)
            )
        ])
        drawn = time.perf_counter()
        outcomes = judge(self.recognizer, prompts, pictures)
        return (
            Drawn(pictures=pictures, shown=tuple(rows), outcomes=tuple(outcomes)),
            found - start,
            drawn - found,
        )

    def measure(
        self, model: TextToImage, point: Point, kind: BenchKind, on_unit: OnUnit
    ) -> tuple[dict[str, Any], Drawn]:
        """Everything about one kind at one point, ready for JSON, and the pictures."""
        import torch

        prompts = self.of_kind(kind)
        drawn, seconds_to_find, seconds_to_draw = self.draw(model, point, kind, on_unit)
        copies = [
            copy_similarity(torch.from_numpy(picture), [each.neighbor for each in row]) if row else None
            for picture, row in zip(drawn.pictures, drawn.shown, strict=True)
        ]
        return {
            "point": point.name,
            "kind": kind,
            "seconds_to_find": seconds_to_find,
            "seconds_to_draw": seconds_to_draw,
            "prompts": [
                {
                    "text": prompt.text,
                    "class_ids": list(prompt.class_ids),
                    "shown": [each.class_id for each in row],
                    "copy_similarity": copy,
                    **outcome.to_json(),
                }
                for prompt, row, copy, outcome in zip(prompts, drawn.shown, copies, drawn.outcomes, strict=True)
            ],
        }, drawn


def swap(own: Sequence[Shown], other: Sequence[Shown], size: Size) -> tuple[Shown, ...]:
    """The pictures of `other` under the captions of `own`: what is then drawn comes from the one or from the other."""
    references = with_pictures_of([each.neighbor for each in own], [each.neighbor for each in other])
    swapped = neighbors_of([], references, size)
    return tuple(Shown(neighbor=new, class_id=each.class_id) for new, each in zip(swapped, other, strict=False))


def _retrieve(model: TextToImage, point: Point, prompt: Prompt, excluded: Mapping[int, Sequence[int]]) -> Any:
    ids = [str(each) for class_id in prompt.class_ids for each in excluded.get(class_id, ())]
    return model.retrieve(prompt.text, settings=replace(point.settings, exclude=(*point.settings.exclude, *ids)))


def _ids_by_class(kb: "AnyKnowledgeBase") -> dict[int, list[int]]:
    """All pairs of the emoji corpus in a knowledge base, by the class that they show."""
    found: dict[int, list[int]] = {}
    for pair in kb.store.get([int(each) for each in kb.store.matching_ids()]):
        class_id = class_of(pair.metadata)
        if class_id is not None:
            found.setdefault(class_id, []).append(pair.id)
    return found


def summary(prompts: Sequence[Prompt], unit: Mapping[str, Any], *, classes: int | None = None) -> dict[str, Any]:
    """The figures of one kind at one point, each share with its interval; of several kinds that ask for `classes`.

    `drew_shown` and `copied` are counted among the prompts that have neighbours, as facts among those that ask for one.
    """
    n = len(prompts)
    rows = unit["prompts"]
    measured = shares(prompts, [Outcome.from_json(row) for row in rows])
    copies = [row["copy_similarity"] for row in rows if row["copy_similarity"] is not None]
    measured["found"] = sum(set(row["class_ids"]) <= set(row["shown"]) for row in rows) / n
    shown = [row for row in rows if row["shown"]]
    if shown:
        measured |= {"drew_shown": sum(_drew_shown(row) for row in shown) / len(shown)}
        measured |= {"n_drew_shown": len(shown)}
    if copies:
        measured |= {"copied": sum(copy > WARN_ABOVE for copy in copies) / len(copies), "n_copied": len(copies)}
    return {
        "n": n,
        **with_intervals(measured, n, classes=classes),
        "copy_similarity": sum(copies) / len(copies) if copies else None,
        "seconds_per_image": unit["seconds_to_draw"] / n,
        "seconds_per_query": unit["seconds_to_find"] / n,
    }


def _drew_shown(row: Mapping[str, Any]) -> bool:
    """Whether a picture's largest figure is of the class of a neighbour, where it has a figure."""
    largest = max(row["figures"], key=lambda figure: figure["side"], default=None)
    return largest is not None and largest["class_id"] in row["shown"]


def pooled(units: Sequence[tuple[Sequence[Prompt], Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of one point over the prompts of all its kinds, which ask for the same classes."""
    rows = [row for _, unit in units for row in unit["prompts"]]
    seconds = {name: sum(unit[name] for _, unit in units) for name in ("seconds_to_draw", "seconds_to_find")}
    classes = max(len(prompts) for prompts, _ in units)
    together = [prompt for prompts, _ in units for prompt in prompts]
    return summary(together, {"prompts": rows, **seconds}, classes=classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepReport:
    """What was measured at every point, by kind and over all kinds, and what the true scenes score."""

    sweep: Sweep
    kinds: tuple[BenchKind, ...]
    n: int
    points: tuple[Point, ...]
    by_kind: Mapping[str, Mapping[str, Mapping[str, Any]]]  # of a point, of a kind
    overall: Mapping[str, Mapping[str, Any]]  # of a point
    ceiling: Mapping[str, Mapping[str, float]]  # of a kind, and of "all"
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Points in order, and each by its name too, as DESIGN section 4 names the arms; rates are fractions of 1."""
        points = [
            {
                "name": point.name,
                "x": point.x,
                **self.overall[point.name],
                "kinds": dict(self.by_kind[point.name]),
                "settings": to_dict(point.settings),
            }
            for point in self.points
        ]
        named = {
            point["name"]: {
                name: value["value"] if isinstance(value, dict) and "value" in value else value
                for name, value in point.items()
                if name not in ("name", "x", "kinds", "settings")
            }
            for point in points
        }
        return {
            "n": self.n * len(self.kinds),
            **(named if self.sweep == "arms" else {}),
            "sweep": self.sweep,
            "kinds": list(self.kinds),
            "points": points,
            "ceiling": {kind: dict(each) for kind, each in self.ceiling.items()},
            **self.facts,
        }


def run_sweep(
    bench: KindsBench,
    model: TextToImage,
    sweep: Sweep,
    settings: GenerateSettings,
    *,
    out: Path | None = None,
    seed: int = 0,
    models: "Models | None" = None,
    on_unit: OnUnit = ignore_unit,
) -> SweepReport:
    """Draw and judge every point; with `out`, what is there of the same sweep is not drawn again.

    `models` gives each point a model of its own, with another knowledge base, say. It is not asked for points that are
    done, whose times are kept with them. QueryError where prompts would exchange pictures and a kind has only one.
    """
    points = plan_points(sweep, settings)
    if any(point.source == "swapped" for point in points) and any(len(bench.of_kind(kind)) < 2 for kind in bench.kinds):
        raise QueryError(
            "in the sweep over neighbors prompts exchange pictures, so it needs two of each kind: give -n 2"
        )
    by_kind: dict[str, dict[str, Any]] = {}
    overall: dict[str, Any] = {}
    added: Mapping[str, float] = {}
    for point in points:
        units = []
        for kind in bench.kinds:
            unit = _kept_unit(bench, model, point, kind, out=out, models=models, on_unit=on_unit)
            units.append((bench.of_kind(kind), unit))
            added = added or unit.get("added", {})
        by_kind[point.name] = {unit["kind"]: summary(prompts, unit) for prompts, unit in units}
        overall[point.name] = pooled(units)
    kb = check(model, settings)
    return SweepReport(
        sweep=sweep,
        kinds=bench.kinds,
        n=len(bench.prompts) // len(bench.kinds),
        points=tuple(points),
        by_kind=by_kind,
        overall=overall,
        ceiling=bench.ceiling,
        facts={
            "recognizer": judge_facts(bench.recognizer),
            "settings": {"seed": seed, **to_dict(settings)},
            "model": {"name": model.name, "digest": model.digest, "image_size": bench.size},
            "kb": kb_facts(kb),
            **({"added": dict(added)} if added else {}),
        },
    )


def _kept_unit(
    bench: KindsBench,
    model: TextToImage,
    point: Point,
    kind: BenchKind,
    *,
    out: Path | None,
    models: "Models | None",
    on_unit: OnUnit,
) -> Mapping[str, Any]:
    """One kind at one point: what is kept of it, or drawn now and kept."""
    from radt.evaluation.emoji_draw_sweep_sheet import write_unit_sheets

    key = _key(bench, model, point, kind)
    path = None if out is None else out / UNITS / f"{point.name}.{kind}.json"
    if path is not None and (kept := _read_unit(path, key)) is not None:
        return kept
    unit, drawn = bench.measure(models.model_of(point) if models else model, point, kind, on_unit)
    if models is not None and point.kb == "after":
        unit["added"] = models.added()
    if path is not None:
        write_unit_sheets(path.parent, bench, drawn, point=point, kind=kind)
        write_bytes(path, (json.dumps({"key": key, **unit}, indent=1) + "\n").encode())
    return unit


def _key(bench: KindsBench, model: TextToImage, point: Point, kind: BenchKind) -> str:
    """Changes with everything that a unit depends on; not with how many prompts a network call takes."""
    prompts = bench.of_kind(kind)
    glyphs: dict[str, str] = {}
    if point.kb is not None:  # what is taken out of the copy and added to it is of all prompts
        glyphs = {"glyphs": bench.glyph_digest(bench.prompts)}
    elif point.source.startswith("by_hand") or point.source.endswith("one_wrong"):
        glyphs = {"glyphs": bench.glyph_digest(prompts)}
    return digest(
        _KeyParts(
            model=model.digest,
            kb=json.dumps(kb_facts(check(model, point.settings)), sort_keys=True, default=str),
            point={**to_dict(replace(point, settings=replace(point.settings, batch_size=1))), **glyphs},
            recognizer=bench.recognizer.digest,
            size=bench.size,
            judging=JUDGING,
            prompts=[[prompt.text, prompt.seed, list(prompt.class_ids), prompt.wrong.position] for prompt in prompts],
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _KeyParts:
    model: str
    kb: str
    point: Mapping[str, Any]
    recognizer: str
    size: int
    judging: int
    prompts: Sequence[Any]


def _read_unit(path: Path, key: str) -> Mapping[str, Any] | None:
    """What is kept, if it is of the same key; a damaged file is drawn again."""
    try:
        unit: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return unit if unit.pop("key", None) == key else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """A model for each point, and how long adding to a knowledge base took: `added` is empty where nothing was."""

    model_of: Callable[[Point], TextToImage]
    added: Callable[[], dict[str, float]]


def new_entity_models(bench: KindsBench, model: TextToImage, folder: Path) -> Models:
    """Models before and after the prompts' entities are added to a copy of the knowledge base, in `folder`.

    The copy first loses every pair of their classes. Then, as by `radt index add`, four pictures of each come back
    under its caption.
    """
    import shutil

    from PIL import Image

    from index.knowledge_base import KnowledgeBase
    from radt.corpora.emoji import render_rendition, rendition
    from radt.evaluation.emoji_draw import WRONG_PICTURE_SIZE, WRONG_RENDITIONS

    kb = model.kb
    if not isinstance(kb, KnowledgeBase) or kb.remote is not None:
        raise QueryError("--new-entity changes a copy of the knowledge base, so name one on this machine with --kb")
    entities = {entity.class_id: entity for prompt in bench.prompts for entity in prompt.entities}
    timing: dict[str, float] = {}
    copies: dict[str, TextToImage] = {}

    def copied(name: str) -> KnowledgeBase:
        target = folder / name
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(kb.directory, target)
        copy = KnowledgeBase.open(target, kb.embedder)
        by_class = _ids_by_class(copy)
        gone = [each for class_id in entities for each in by_class.get(class_id, ())]
        if gone:
            copy.remove(gone)
        return copy

    def add_all(copy: KnowledgeBase) -> None:
        start = time.perf_counter()
        for entity in entities.values():
            pictures = [
                Image.fromarray(
                    render_rendition(bench.glyphs[entity.position], rendition(entity, number), WRONG_PICTURE_SIZE)
                )
                for number in range(WRONG_RENDITIONS)
            ]
            copy.add(pictures, entity.caption, metadata=entity.facts())
        timing.update(seconds_to_add=time.perf_counter() - start, entities=float(len(entities)))

    def model_of(point: Point) -> TextToImage:
        name = point.kb or "before"
        if name not in copies:
            copy = copied(name)
            if name == "after":
                add_all(copy)
            copies[name] = TextToImage(model.bundle, kb=copy, device=model.device, compiled=model.compiled)
        return copies[name]

    return Models(model_of=model_of, added=lambda: dict(timing))
