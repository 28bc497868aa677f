"""emoji-draw: are entities that no training saw drawn right, from the neighbours found for them (rows R17, I6)?

Every held-out class that is chosen gets one prompt, and the prompt is drawn three times from the same noise: with the
neighbours found for it, with none, and with one of them exchanged for a picture of something else. Whether the picture
shows the entity is told by the trained recogniser (`emoji_recognizer.py`) where there is one, and by pixel distance
(`recognizer.py`) beside it or in its place; whether the ground is as asked by `color.py`.

This is the short form. Prompts of all kinds and sweeps over settings: `emoji_draw_kinds.py`, `emoji_draw_sweep.py`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from index.config import to_dict
from index.errors import KnowledgeBaseError, QueryError
from radt.copying import copy_similarity
from radt.corpora.emoji import Entity, GlyphRenderer, load_entities, render_rendition, rendition
from radt.corpora.scenes import PALETTE, Glyphs, Scene, benchmark_prompt, render_scene
from radt.evaluation.color import border_color, nearest_color
from radt.evaluation.emoji_recognizer import EmojiRecognizer, find_recognizer
from radt.evaluation.intervals import Interval, wilson
from radt.evaluation.ranking import rank_of
from radt.evaluation.reading import read
from radt.evaluation.recognizer import Recognizer
from radt.neighbors import Neighbor, Reference, neighbors_of
from radt.pipeline import DrawRequest, OnStep, TextToImage, ignore
from radt.recognizer_network import crop_box
from radt.resizing import Size
from radt.settings import GenerateSettings

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

    AnyKnowledgeBase = KnowledgeBase | JoinedKnowledgeBase

ArmName: TypeAlias = Literal["with_retrieval", "without_retrieval", "with_one_wrong"]
Pictures: TypeAlias = UInt8[np.ndarray, "n size size 3"]

BATCH_SIZE = 20  # prompts a network call: 300 pictures of 32x32 take a few minutes on two cores
WRONG_PICTURE_SIZE = 128  # as `radt corpus emoji` draws by default
WRONG_RENDITIONS = 4
MAKE_A_KB = "`radt corpus emoji emoji` and then `radt index build emoji --kb kb` make one"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One entity to draw on one ground, and what is put in the place of one neighbour to lead the model astray.

    `wrong` is an entity of training, of another class. `wrong_place` in [0, 1) says which neighbour it replaces.
    """

    entity: Entity
    scene: Scene
    seed: int
    wrong: Entity
    wrong_rendition: int
    wrong_place: float

    @property
    def prompt(self) -> str:
        """What the model is asked for."""
        return self.scene.caption


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a picture shows. `rank` is the asked class's place among all, from 1; `guess` the likeliest entity.

    Both are the trained recogniser's where there is one; `pixel_rank` is always by pixel distance, None if not told.
    """

    rank: int
    guess: Entity
    ground: str
    pixel_rank: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A neighbour that a picture was drawn from, and the class it shows: None where that is no emoji of the table."""

    neighbor: Neighbor
    class_id: int | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawing:
    """One picture, what it was drawn from, and what became of it."""

    picture: UInt8[np.ndarray, "size size 3"]
    shown: tuple[Shown, ...]
    verdict: Verdict
    copy_similarity: float | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Arm:
    """All tasks drawn in one of the three ways. `seconds` is wall time, encoding included, retrieval not."""

    drawings: tuple[Drawing, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EmojiDrawReport:
    """Everything measured and everything drawn."""

    tasks: tuple[Task, ...]
    truths: Pictures
    arms: Mapping[ArmName, Arm]
    retrieval_seconds: float
    ceiling: Mapping[str, float]
    judge: Mapping[str, Any]
    settings: GenerateSettings
    seed: int
    model: Mapping[str, Any]
    kb: Mapping[str, Any]

    @property
    def n(self) -> int:
        """Number of prompts, each of another held-out class."""
        return len(self.tasks)

    def shares(self, name: ArmName) -> dict[str, float]:
        """What was counted in one arm, as shares of its pictures."""
        return drawing_shares(self.tasks, self.arms[name].drawings)

    def retrieval_shares(self) -> dict[str, float]:
        """How often the neighbours found show the asked class."""
        return retrieval_shares(self.tasks, [each.shown for each in self.arms["with_retrieval"].drawings])

    def intervals(self) -> dict[str, dict[str, Interval]]:
        """95 % intervals of every share. A prompt counts as one trial, also where it has several neighbours."""
        measured: dict[str, dict[str, float]] = {name: self.shares(name) for name in self.arms}
        measured["retrieval"] = self.retrieval_shares()
        return {
            part: {name: wilson(share, self.n) for name, share in shares.items()} for part, shares in measured.items()
        }

    def to_json(self) -> dict[str, Any]:
        """As DESIGN section 4 fixes it, and more."""
        arms: dict[str, Any] = {name: {**self.shares(name), **averages(arm)} for name, arm in self.arms.items()}
        return {
            "n": self.n,
            **arms,
            "retrieval": {**self.retrieval_shares(), "seconds_per_query": self.retrieval_seconds / self.n},
            "recognizer": dict(self.judge),
            "recognizer_ceiling": dict(self.ceiling),
            "intervals": {
                part: {name: list(interval) for name, interval in each.items()}
                for part, each in self.intervals().items()
            },
            "settings": {"seed": self.seed, **to_dict(self.settings)},
            "model": dict(self.model),
            "kb": dict(self.kb),
        }


def evaluate(
    model: TextToImage,
    *,
    n: int = 100,
    seed: int = 0,
    settings: GenerateSettings | None = None,
    font: str | Path | None = None,
    trained: EmojiRecognizer | None = None,
    on_step: OnStep = ignore,
) -> EmojiDrawReport:
    """Measure a model that has a knowledge base. Without `settings`, the bundle's own, in batches.

    `trained` is the recogniser that judges; without it, the one inside the package, and where there is none, pixels.
    The classes, grounds, noise and wrong pictures depend on `seed` alone, and those of a smaller `n` are the first of
    a larger one's. To measure many settings, make an `EmojiDrawBench` once.
    """
    check(model, settings)
    side, _ = model.picture_size(settings or model.settings())
    bench = EmojiDrawBench.prepare(n=n, seed=seed, size=side, font=font, trained=trained or find_recognizer())
    return bench.run(model, settings=settings, on_step=on_step)


class EmojiDrawBench:
    """The tasks and the recognisers, made once and used for any number of settings and models of one resolution.

    `trained` judges the entity where it is given; else pixels do. ModelError where it lacks a class.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        glyphs: Glyphs,
        candidates: Sequence[Entity],
        *,
        size: int,
        seed: int,
        trained: EmojiRecognizer | None = None,
    ):
        self.tasks, self.glyphs, self.size, self.seed, self.trained = tuple(tasks), glyphs, size, seed, trained
        if trained is not None:
            trained.check_knows(task.entity.class_id for task in self.tasks)
        self.recognizer = Recognizer(glyphs, candidates, box=tasks[0].scene.placements[0].box, size=size)
        self.truths = np.stack([render_scene(task.scene, glyphs, size) for task in tasks])

    @classmethod
    def prepare(
        cls,
        *,
        n: int,
        seed: int,
        size: int,
        font: str | Path | None = None,
        trained: EmojiRecognizer | None = None,
    ) -> "EmojiDrawBench":
        """Choose the tasks among all that the font draws; `size` is the side of the model's pictures."""
        glyphs = GlyphRenderer(font)
        drawn = [entity for entity in load_entities() if glyphs.draws(entity)]
        return cls(plan_tasks(drawn, n=n, seed=seed), glyphs, drawn, size=size, seed=seed, trained=trained)

    def run(
        self, model: TextToImage, *, settings: GenerateSettings | None = None, on_step: OnStep = ignore
    ) -> EmojiDrawReport:
        """Retrieve, draw the three arms, and judge."""
        kb, asked = check(model, settings), settings or model.settings(batch_size=BATCH_SIZE)
        assert model.picture_size(asked) == (self.size, self.size), (model.picture_size(asked), self.size)
        start = time.perf_counter()
        found = retrieve(model, kb, self.tasks, asked)
        retrieval_seconds = time.perf_counter() - start
        plans: dict[ArmName, list[tuple[Shown, ...]]] = {
            "with_retrieval": found,
            "without_retrieval": [() for _ in self.tasks],
            "with_one_wrong": [
                mislead(self.glyphs, task, shown, model.size) for task, shown in zip(self.tasks, found, strict=True)
            ],
        }
        arms = {
            name: self._draw(model, plan, asked, _part(on_step, place, len(plans)))
            for place, (name, plan) in enumerate(plans.items())
        }
        return EmojiDrawReport(
            tasks=self.tasks,
            truths=self.truths,
            arms=arms,
            retrieval_seconds=retrieval_seconds,
            ceiling=self.ceiling(),
            judge=judge_facts(self.trained),
            settings=asked,
            seed=self.seed,
            model={"name": model.name, "digest": model.digest, "image_size": self.size},
            kb=kb_facts(kb),
        )

    def judge(self, pictures: Pictures) -> list[Verdict]:
        """What each task's picture shows."""
        verdicts: dict[int, Verdict] = {}
        for ground, color in PALETTE.items():
            places = [place for place, task in enumerate(self.tasks) if task.scene.ground == ground]
            if not places:
                continue
            distances = self.recognizer.distances(pictures[places], color)
            ranks = self.recognizer.ranks(distances, [self.tasks[place].entity.class_id for place in places])
            for place, rank, nearest in zip(places, ranks, distances.argmin(axis=1), strict=True):
                measured = nearest_color(border_color(pictures[place]), PALETTE)
                guess = self.recognizer.entities[nearest]
                verdicts[place] = Verdict(rank=int(rank), guess=guess, ground=measured, pixel_rank=int(rank))
        by_pixels = [verdicts[place] for place in range(len(self.tasks))]
        return by_pixels if self.trained is None else self._recognized(self.trained, pictures, by_pixels)

    def _recognized(self, trained: EmojiRecognizer, pictures: Pictures, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts with entity and rank by the trained recogniser, of the largest figure that the picture shows.

        A picture without a figure has the last rank, and its guess stays that of the pixels.
        """
        side = trained.network.config.image_size
        by_class = {entity.class_id: entity for entity in reversed(load_entities())}
        largest = [read(picture).largest for picture in pictures]
        judged = list(verdicts)
        for place, (task, figure) in enumerate(zip(self.tasks, largest, strict=True)):
            if figure is None:
                judged[place] = replace(judged[place], rank=len(trained.classes))
                continue
            (scores,) = trained.logits(crop_box(pictures[place], figure.crop, side)[None])
            own = int(trained.columns([task.entity.class_id])[0])
            guess = by_class[trained.classes[int(scores.argmax())]]
            judged[place] = replace(judged[place], rank=rank_of(scores, own), guess=guess)
        return judged

    def ceiling(self) -> dict[str, float]:
        """What the measure gives to the true scenes: no model can do better."""
        return verdict_shares(self.tasks, self.judge(self.truths))

    def _draw(
        self, model: TextToImage, plan: Sequence[tuple[Shown, ...]], settings: GenerateSettings, on_step: OnStep
    ) -> Arm:
        requests = [
            DrawRequest(prompt=task.prompt, neighbors=[each.neighbor for each in shown], seed=task.seed)
            for task, shown in zip(self.tasks, plan, strict=True)
        ]
        start = time.perf_counter()
        pictures = list(model.draw_many(requests, settings=settings, on_step=on_step))
        seconds = time.perf_counter() - start
        verdicts = self.judge(np.stack([picture.numpy() for picture in pictures]))
        drawings = [
            Drawing(
                picture=picture.numpy(),
                shown=shown,
                verdict=verdict,
                copy_similarity=copy_similarity(picture, [each.neighbor for each in shown]),
            )
            for picture, shown, verdict in zip(pictures, plan, verdicts, strict=True)
        ]
        return Arm(drawings=tuple(drawings), seconds=seconds)


def plan_tasks(entities: Sequence[Entity], *, n: int, seed: int) -> list[Task]:
    """Choose `n` held-out classes by lot, one entity of each, and the twelve grounds in turn, in an order by lot."""
    held_out: dict[int, list[Entity]] = {}
    for entity in entities:
        if entity.held_out:
            held_out.setdefault(entity.class_id, []).append(entity)
    if not 1 <= n <= len(held_out):
        raise QueryError(f"n must lie between 1 and {len(held_out)}, the held-out classes that the font draws, got {n}")
    if seed < 0:
        raise QueryError(f"the seed must be 0 or more, got {seed}")
    trained = [entity for entity in entities if not entity.held_out]
    order = np.random.default_rng([seed, 0]).permutation(sorted(held_out))
    names = list(PALETTE)
    tasks = []
    for place, class_id in enumerate(order[:n].tolist()):
        # Its own generator each, so that the tasks of a small n are the first of a large one's.
        rng = np.random.default_rng([seed, 1, place])
        round_of_grounds = np.random.default_rng([seed, 2, place // len(names)]).permutation(len(names))
        members = held_out[class_id]
        entity = members[int(rng.integers(len(members)))]
        tasks.append(
            Task(
                entity=entity,
                scene=benchmark_prompt(entity, names[int(round_of_grounds[place % len(names)])]),
                seed=seed + place,
                wrong=trained[int(rng.integers(len(trained)))],
                wrong_rendition=int(rng.integers(WRONG_RENDITIONS)),
                wrong_place=float(rng.random()),
            )
        )
    return tasks


def check(model: TextToImage, settings: GenerateSettings | None = None) -> "AnyKnowledgeBase":
    """The model's knowledge base; a QueryError where nothing could be retrieved."""
    if model.kb is None:
        raise QueryError(f"emoji-draw needs a knowledge base to find neighbours in: name one with --kb; {MAKE_A_KB}")
    if (settings or model.settings()).k < 1:
        raise QueryError("emoji-draw compares with and without neighbours, so k must be at least 1, got 0")
    return model.kb


def retrieve(
    model: TextToImage, kb: "AnyKnowledgeBase", tasks: Sequence[Task], settings: GenerateSettings
) -> list[tuple[Shown, ...]]:
    """Each prompt's neighbours as the model finds them, and what they show by the corpus's own records."""
    return found_emoji(kb, show_classes(kb, [model.retrieve(task.prompt, settings=settings) for task in tasks]))


def found_emoji(kb: "AnyKnowledgeBase", rows: list[tuple[Shown, ...]]) -> list[tuple[Shown, ...]]:
    """The neighbours as they are; a KnowledgeBaseError where none of them is an emoji of the table."""
    if all(each.class_id is None for row in rows for each in row):
        raise KnowledgeBaseError(f"{kb.name!r} finds no emoji for the prompts of emoji-draw: {MAKE_A_KB}")
    return rows


def show_classes(kb: "AnyKnowledgeBase", found: Sequence[Sequence[Neighbor]]) -> list[tuple[Shown, ...]]:
    """What neighbours show by the corpus's own records."""
    pairs = kb.store.get(sorted({int(neighbor.id) for row in found for neighbor in row}))
    shows = {str(pair.id): class_of(pair.metadata) for pair in pairs}
    return [tuple(Shown(neighbor=each, class_id=shows[each.id]) for each in row) for row in found]


def class_of(metadata: Mapping[str, Any]) -> int | None:
    """The class that a pair of the emoji corpus shows; None for any other pair."""
    return _classes_by_codes().get(str(metadata.get("codes")))


@cache
def _classes_by_codes() -> dict[str, int]:
    return {" ".join(entity.codes): entity.class_id for entity in load_entities()}


@runtime_checkable  # beartype asks, in the tests
class Misled(Protocol):
    """What says how a model is led astray: which picture of what takes which neighbour's place, in [0, 1)."""

    @property
    def wrong(self) -> Entity: ...  # noqa: D102
    @property
    def wrong_rendition(self) -> int: ...  # noqa: D102
    @property
    def wrong_place(self) -> float: ...  # noqa: D102


def mislead(glyphs: Glyphs, task: Misled, shown: Sequence[Shown], size: Size) -> tuple[Shown, ...]:
    """The neighbours, of this size, with one exchanged for the task's wrong picture under its own, true caption."""
    place = int(task.wrong_place * len(shown))
    wrong = show_rendition(glyphs, task.wrong, task.wrong_rendition, size)
    return (*shown[:place], wrong, *shown[place + 1 :])


def show_rendition(glyphs: Glyphs, entity: Entity, number: int, size: Size) -> Shown:
    """A picture of the emoji corpus and its caption as a neighbour of this size, brought by hand."""
    picture = render_rendition(glyphs[entity.position], rendition(entity, number), WRONG_PICTURE_SIZE)
    reference = Reference(image=Image.fromarray(picture), caption=entity.caption, name=entity.name)
    return Shown(neighbor=neighbors_of([], [reference], size)[0], class_id=entity.class_id)


def judge_facts(trained: EmojiRecognizer | None) -> dict[str, Any]:
    """Who tells the entity: `entity_top1` and `entity_top5` are its; `entity_top1_by_pixels` stands beside them."""
    if trained is None:
        return {"judge": "pixels", "digest": None, "classes": len({entity.class_id for entity in load_entities()})}
    return {"judge": "trained", "digest": trained.digest, "classes": len(trained.classes)}


def drawing_shares(tasks: Sequence[Task], drawings: Sequence[Drawing]) -> dict[str, float]:
    """Verdicts, and how they go with what was shown.

    `right_neighbor`: at least one neighbour was of the asked class. `drew_wrong_neighbor`: the picture is nearest to
    a class that a neighbour showed and nobody asked for.
    """
    pairs = list(zip(tasks, drawings, strict=True))
    return verdict_shares(tasks, [drawing.verdict for drawing in drawings]) | {
        "right_neighbor": _share(any(_are_right(task, drawing.shown)) for task, drawing in pairs),
        "drew_wrong_neighbor": _share(
            drawing.verdict.guess.class_id in {each.class_id for each in drawing.shown} - {task.entity.class_id}
            for task, drawing in pairs
        ),
    }


def verdict_shares(tasks: Sequence[Task], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The figures of the benchmark; the entity's twice, as the judge has it and by pixels."""
    pairs = list(zip(tasks, verdicts, strict=True))
    by_pixels = [verdict.rank if verdict.pixel_rank is None else verdict.pixel_rank for verdict in verdicts]
    return {
        "entity_top1": _share(verdict.rank <= 1 for verdict in verdicts),
        "entity_top5": _share(verdict.rank <= 5 for verdict in verdicts),
        "entity_top1_by_pixels": _share(rank <= 1 for rank in by_pixels),
        "entity_top5_by_pixels": _share(rank <= 5 for rank in by_pixels),
        "ground_color": _share(verdict.ground == task.scene.ground for task, verdict in pairs),
    }


def retrieval_shares(tasks: Sequence[Task], shown: Sequence[Sequence[Shown]]) -> dict[str, float]:
    """Over prompts: any neighbour of the asked class, their share among the neighbours, and all of them."""
    right = [_are_right(task, row) for task, row in zip(tasks, shown, strict=True)]
    return {
        "recall_at_k": _share(any(row) for row in right),
        "precision_at_k": _mean([sum(row) / len(row) if row else 0.0 for row in right]),
        "all_right": _share(bool(row) and all(row) for row in right),
    }


def averages(arm: Arm) -> dict[str, float | None]:
    """What is no share: the mean of the copy similarity (None without neighbours), and the time a picture took."""
    copies = [each.copy_similarity for each in arm.drawings if each.copy_similarity is not None]
    return {
        "copy_similarity": _mean(copies) if copies else None,
        "seconds_per_image": arm.seconds / len(arm.drawings),
    }


def kb_facts(kb: "AnyKnowledgeBase") -> dict[str, Any]:
    """What the neighbours came from."""
    return {
        "path": kb.name,
        "created": kb.manifest.created,
        "pairs": len(kb),
        "fingerprint": kb.manifest.fingerprint,
        "snapshot": kb.store.version,
    }


def _are_right(task: Task, shown: Sequence[Shown]) -> list[bool]:
    return [each.class_id == task.entity.class_id for each in shown]


def _share(truths: Any) -> float:
    return _mean([float(truth) for truth in truths])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _part(on_step: OnStep, place: int, parts: int) -> Callable[[int, int], None]:
    """One part's progress as progress of the whole."""
    return lambda done, total: on_step(place * total + done, parts * total)
