"""EmojiDrawBench: held-out entities in prompts of six kinds, and what of each prompt its picture shows.

`alone` names the entity and nothing else; `ground` is the plain prompt of `emoji_draw.py`; `placed`, `sized`, `counted`
and `two` are worded by lot as the scenes of training are, of entities that training never saw; the two of a prompt are
both held out. The entity is told by the trained recogniser from the figures that `reading.py` finds, all else by the
reading itself, which knows nothing of the prompt. The same is asked of the true scenes: no model can do better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, UInt8

from index.errors import QueryError
from radt.corpora.emoji import Entity
from radt.corpora.scenes import PLACES, Glyphs, Scene, benchmark_prompt, render_scene, sample_scene
from radt.corpora.wording import noun, with_article
from radt.evaluation.emoji_draw import plan_tasks
from radt.evaluation.emoji_recognizer import EmojiRecognizer
from radt.evaluation.intervals import wilson
from radt.evaluation.ranking import rank_of
from radt.evaluation.reading import Figure, Reading, read, relation_holds
from radt.recognizer_network import crop_box

BenchKind: TypeAlias = Literal["ground", "alone", "placed", "sized", "counted", "two"]
Pictures: TypeAlias = UInt8[np.ndarray, "n h w 3"]

KINDS: tuple[BenchKind, ...] = get_args(BenchKind)
SEED_STEP = 100_000  # between the noise of two kinds
PLACE_NAMES = (*PLACES, "middle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One thing to draw. `entities` are the asked ones, as the scene places them: one, or two of different classes.

    `wrong`, an entity of training, is what one neighbour is exchanged for where a model is to be led astray.
    """

    kind: BenchKind
    scene: Scene
    entities: tuple[Entity, ...]
    seed: int
    wrong: Entity
    wrong_rendition: int
    wrong_place: float

    @property
    def text(self) -> str:
        """What the model is asked for."""
        return self.scene.caption

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The classes asked for."""
        return tuple(entity.class_id for entity in self.entities)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one prompt.

    `ranks` are the places of the asked classes among all, from 1, in the order of the prompt's entities; `guesses` the
    best classes of the figures. `agrees` says of every fact that the prompt asks for whether the picture has it.
    """

    reading: Reading
    ranks: tuple[int, ...]
    guesses: tuple[int, ...]
    agrees: Mapping[str, bool]

    @property
    def is_right(self) -> bool:
        """Every asked fact holds, and every entity is the nearest class."""
        return all(self.agrees.values()) and max(self.ranks) <= 1

    def to_json(self) -> dict[str, Any]:
        """Everything that was seen."""
        return {
            "ground": self.reading.ground,
            "figures": [
                {"center": list(each.center), "side": each.side, "class_id": guess}
                for each, guess in zip(self.reading.figures, self.guesses, strict=True)
            ],
            "ranks": list(self.ranks),
            "agrees": dict(self.agrees),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Outcome":
        """What `to_json` wrote."""
        figures = tuple(Figure(center=tuple(each["center"]), side=each["side"]) for each in values["figures"])
        return cls(
            reading=Reading(ground=values["ground"], figures=figures),
            ranks=tuple(values["ranks"]),
            guesses=tuple(each["class_id"] for each in values["figures"]),
            agrees=dict(values["agrees"]),
        )


def read_kinds(text: str) -> tuple[BenchKind, ...]:
    """`all`, or kinds with commas between them."""
    names = tuple(name.strip() for name in text.split(",")) if text.strip() != "all" else KINDS
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise QueryError(f"unknown kind {', '.join(map(repr, unknown))}: choose among all, {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in names)


def plan_prompts(entities: Sequence[Entity], kinds: Sequence[BenchKind], *, n: int, seed: int) -> list[Prompt]:
    """`n` prompts of each kind: the same held-out classes in all of them, each in noise of its own.

    They depend on `seed` and kind alone, and those of a smaller `n` are the first of a larger one's. The second entity
    of two is that of the class drawn next.
    """
    held_out = len({entity.class_id for entity in entities if entity.held_out})
    tasks = plan_tasks(entities, n=n, seed=seed)
    order = plan_tasks(entities, n=held_out, seed=seed)
    prompts = []
    for kind in kinds:
        number = KINDS.index(kind)
        for place, task in enumerate(tasks):
            rng = np.random.default_rng([seed, 10 + number, place])
            pair = (task.entity, order[(place + 1) % held_out].entity)
            scene, asked = _scene(kind, pair, task.scene.ground, rng)
            prompts.append(
                Prompt(
                    kind=kind,
                    scene=scene,
                    entities=asked,
                    seed=task.seed + SEED_STEP * number,
                    wrong=task.wrong,
                    wrong_rendition=task.wrong_rendition,
                    wrong_place=task.wrong_place,
                )
            )
    return prompts


def _scene(
    kind: BenchKind, pair: tuple[Entity, Entity], ground: str, rng: np.random.Generator
) -> tuple[Scene, tuple[Entity, ...]]:
    """A scene of the first entity, or of both, and those that it shows, in its order."""
    entity = pair[0]
    if kind == "ground":
        return benchmark_prompt(entity, ground), (entity,)
    if kind == "alone":
        plain = benchmark_prompt(entity, "white")
        caption = with_article(noun(entity))
        return Scene(kind="alone", ground="white", placements=plain.placements, caption=caption), (entity,)
    scene = sample_scene(rng, pair if kind == "two" else pair[:1], kinds={kind: 1.0})
    by_position = {each.position: each for each in pair}
    shown = dict.fromkeys(placement.entity for placement in scene.placements)
    return scene, tuple(by_position[position] for position in shown)


def true_pictures(prompts: Sequence[Prompt], glyphs: Glyphs, size: int) -> Pictures:
    """The scenes as they should look."""
    return np.stack([render_scene(prompt.scene, glyphs, size) for prompt in prompts])


def judge(recognizer: EmojiRecognizer, prompts: Sequence[Prompt], pictures: Pictures) -> list[Outcome]:
    """Read every picture, recognise its figures, and compare with what was asked."""
    readings = [read(picture) for picture in pictures]
    side = recognizer.network.config.image_size
    crops = [
        crop_box(picture, figure.crop, side)
        for picture, reading in zip(pictures, readings, strict=True)
        for figure in reading.figures
    ]
    empty = np.zeros((0, side, side, 3), np.uint8)
    scores = log_softmax(recognizer.logits(np.stack(crops) if crops else empty))
    outcomes, start = [], 0
    for prompt, reading in zip(prompts, readings, strict=True):
        outcomes.append(_outcome(recognizer, prompt, reading, scores[start : start + reading.count]))
        start += reading.count
    return outcomes


def log_softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Logarithms of the probabilities that logits stand for."""
    logits = logits.astype(np.float64)
    above = logits - logits.max(axis=1, keepdims=True)
    return above - np.log(np.exp(above).sum(axis=1, keepdims=True))


def _outcome(
    recognizer: EmojiRecognizer, prompt: Prompt, reading: Reading, scores: Float[np.ndarray, "figures classes"]
) -> Outcome:
    columns = [int(column) for column in recognizer.columns(list(prompt.class_ids))]
    guesses = tuple(recognizer.classes[column] for column in scores.argmax(axis=1)) if len(scores) else ()
    agrees = _agreement(prompt.scene, reading, names_ground=prompt.kind != "alone")
    ranks: tuple[int, ...]
    if len(columns) == 1:
        ranks = (rank_of(_scores_of_all(prompt, reading, scores), columns[0]),)
    else:
        chosen = assign(scores, columns)
        ranks = tuple(
            len(recognizer.classes) if figure is None else rank_of(scores[figure], column)
            for figure, column in zip(chosen, columns, strict=True)
        )
        first, second = (None if place is None else reading.figures[place] for place in chosen)
        holds = first is not None and second is not None and relation_holds(str(prompt.scene.place), first, second)
        agrees["place"] = holds
    return Outcome(reading=reading, ranks=ranks, guesses=guesses, agrees=agrees)


def _scores_of_all(
    prompt: Prompt, reading: Reading, scores: Float[np.ndarray, "figures classes"]
) -> Float[np.ndarray, " classes"]:
    """Of a picture of one entity: the mean over its figures where several are asked for, else the largest one's."""
    if not reading.figures:
        return np.zeros(scores.shape[1])  # a tie of all, which is the last rank
    if prompt.kind == "counted":
        return scores.mean(axis=0)
    return scores[int(np.argmax([figure.side for figure in reading.figures]))]


def _agreement(scene: Scene, reading: Reading, *, names_ground: bool) -> dict[str, bool]:
    """Which of the facts that a prompt asks for, entities and their relation apart, the reading has."""
    largest = reading.largest
    agrees = {"count": reading.count == scene.count}
    if names_ground:
        agrees["ground"] = reading.ground == scene.ground
    if scene.place in PLACE_NAMES:
        agrees["place"] = largest is not None and largest.place == scene.place
    if scene.size is not None:
        agrees["size"] = largest is not None and largest.size == scene.size
    return agrees


def assign(scores: Float[np.ndarray, "figures classes"], columns: Sequence[int]) -> tuple[int | None, ...]:
    """For each class a figure of its own, so that the sum of scores is the largest; None where there are too few."""
    figures: list[int | None] = [*range(len(scores)), *([None] * max(0, len(columns) - len(scores)))]
    lowest = float(scores.min()) - 1 if scores.size else 0.0

    def total(chosen: Sequence[int | None]) -> float:
        return sum(
            lowest if figure is None else float(scores[figure, column])
            for figure, column in zip(chosen, columns, strict=True)
        )

    return max(permutations(figures, len(columns)), key=total)


def shares(prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What was counted, as shares of the prompts. A fact is counted among the prompts that ask for it.

    `entity_top1` and `entity_top5` are of the entity named first; `both_entities` and `one_entity` of prompts of two;
    `agreement` means every asked fact but the entity, `all_right` those and every entity.
    """
    pairs = list(zip(prompts, outcomes, strict=True))
    counted: dict[str, list[bool]] = {"entity_top1": [], "entity_top5": []}
    for _, outcome in pairs:
        counted["entity_top1"].append(outcome.ranks[0] <= 1)
        counted["entity_top5"].append(outcome.ranks[0] <= 5)
        if len(outcome.ranks) > 1:
            counted.setdefault("both_entities", []).append(max(outcome.ranks) <= 1)
            counted.setdefault("one_entity", []).append(min(outcome.ranks) <= 1)
        for fact, holds in outcome.agrees.items():
            counted.setdefault(fact, []).append(holds)
        counted.setdefault("agreement", []).append(all(outcome.agrees.values()))
        counted.setdefault("all_right", []).append(outcome.is_right)
    return {name: sum(values) / len(values) for name, values in counted.items()} | {
        f"n_{name}": len(values) for name, values in counted.items() if len(values) != len(pairs)
    }


def with_intervals(measured: Mapping[str, float], n: int, *, classes: int | None = None) -> dict[str, dict[str, float]]:
    """Each share with its 95 % interval (Wilson); `n_NAME` among the shares says how many a share is of.

    Where that is not `n`, the interval says it too. Where prompts ask for each of so many `classes` more than once,
    intervals are as wide as those of one prompt a class: what goes wrong with a class once tends to go wrong again.
    """
    found = {}
    for name, value in measured.items():
        if not name.startswith("n_"):
            of = int(measured.get(f"n_{name}", n))
            low, high = wilson(value, min(of, classes or of))
            found[name] = {"value": value, "low": low, "high": high} | ({"n": of} if of != n else {})
    return found
