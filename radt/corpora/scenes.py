"""The emoji-scenes corpus (DESIGN section 6): emoji composed on a coloured ground, with a caption that says so.

Everything a caption claims is known exactly, so agreement between prompt and picture is measured, not judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from index.errors import CorpusError
from radt.corpora.emoji import (
    Box,
    Color,
    Entity,
    GlyphRenderer,
    Split,
    compose,
    load_entities,
    placement_layer,
    select,
    table_digest,
)
from radt.corpora.img2dataset import Sample, Written, write_shards
from radt.corpora.wording import COUNT_WORDS, noun, plural, with_article

Kind: TypeAlias = Literal["alone", "placed", "sized", "counted", "two"]
T = TypeVar("T")

# Every two at least 30 apart in Lab (CIE76), so that a colour measured in a picture has one name.
PALETTE: dict[str, Color] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 220, 50),
    "green": (50, 150, 60),
    "teal": (20, 170, 170),
    "blue": (45, 95, 210),
    "purple": (125, 50, 165),
    "pink": (250, 160, 200),
    "brown": (120, 75, 40),
    "gray": (140, 140, 140),
    "white": (255, 255, 255),
    "black": (16, 16, 16),
}

KINDS: dict[Kind, float] = {"alone": 0.65, "placed": 0.15, "sized": 0.05, "counted": 0.10, "two": 0.05}

ALONE_SIDE = 0.78  # sides of the boxes, as fractions of the frame
PLACED_SIDE = 0.45
SIZED_SIDES = {"small": 0.40, "large": 0.96}
COUNTED_SIDE = 0.44
TWO_SIDE = 0.47

# Centres of the boxes, as fractions of the frame.
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
COUNTED_CENTERS: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((0.26, 0.5), (0.74, 0.5)),
    3: ((0.26, 0.26), (0.74, 0.26), (0.5, 0.74)),
    4: ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),
}
RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left of": ((0.26, 0.5), (0.74, 0.5)),
    "right of": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}

# {a} the thing with its article where one reads well, {thing} without, {on} "on a red background" in some wording,
# {ground} the colour's name.
SCENE_TEMPLATES = (
    "{a} {on}",
    "{thing}, {ground} ground",
    "a picture of {a} {on}",
    "{thing} {on}",
    "{ground} ground, {a}",
)
GROUND_TEMPLATES = ("on {a_ground} background", "against {ground}", "on {ground}", "on {a_ground} ground")
PLACE_TEMPLATES = {
    "left": ("on the left", "at the left", "to the left"),
    "right": ("on the right", "at the right", "to the right"),
    "top": ("at the top", "up at the top"),
    "bottom": ("at the bottom", "down at the bottom"),
}
CORNER_TEMPLATES = ("in the {place} corner", "in the {place}", "at the {place}")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
COUNT_TEMPLATES = ("{count} of: {thing}", "{number} x {thing}", "{thing}, {count} times")
TWO_TEMPLATES = ("{a} {relation} {b}", "{a}, {relation} {b}")
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@runtime_checkable  # beartype asks, in the tests
class Glyphs(Protocol):
    """Pictures by an entity's position in the table: a `GlyphRenderer`, or a dict."""

    def __getitem__(self, position: int, /) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One emoji in a scene: the entity's position in the table, and the square it fills."""

    entity: int
    box: Box


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture by its facts. `size` and `place` are None where the caption says nothing of them."""

    kind: Kind
    ground: str
    placements: tuple[Placement, ...]
    caption: str
    size: str | None = None
    place: str | None = None

    @property
    def count(self) -> int:
        """How many emoji the scene shows."""
        return len(self.placements)


def sample_scene(rng: np.random.Generator, entities: Sequence[Entity], *, kinds: Mapping[Kind, float] = KINDS) -> Scene:
    """Draw a scene of these entities. `kinds` weighs the kinds of scene; it need not sum to one."""
    if not entities:
        raise CorpusError("there is no entity to draw a scene of: choose another split or font")
    names = tuple(kinds)
    weights = np.array([kinds[name] for name in names], dtype=np.float64)
    kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    entity = _pick(rng, entities)
    ground = _pick(rng, tuple(PALETTE))
    if kind == "two":
        others = [other for other in entities if other.class_id != entity.class_id]
        if not others:
            raise CorpusError(f"a scene of two needs another class beside {entity.name!r}: give more entities")
        return _two(rng, (entity, _pick(rng, others)), ground)
    return _ONE_ENTITY[kind](rng, entity, ground)


def benchmark_prompt(entity: Entity, ground: str) -> Scene:
    """The plainest scene: one entity alone on a ground, in the plainest words."""
    if ground not in PALETTE:
        raise CorpusError(f"unknown ground {ground!r}: use one of {', '.join(PALETTE)}")
    caption = f"{with_article(noun(entity))} on {with_article(ground)} background"
    return Scene(kind="alone", ground=ground, placements=(_placed(entity, (0.5, 0.5), ALONE_SIDE),), caption=caption)


def render_scene(scene: Scene, glyphs: Glyphs, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a scene, glyphs upright: RGB."""
    picture = np.full((size, size, 3), PALETTE[scene.ground], dtype=np.uint8)
    for placement in scene.placements:
        picture = compose(placement_layer(glyphs[placement.entity], placement.box, size), picture)
    return picture


def scene_facts(scene: Scene, entities: Sequence[Entity]) -> dict[str, Any]:
    """The ground truth of a scene, for a corpus record. `entities` is the whole table."""
    shown = [(entities[p.entity], p.box) for p in scene.placements]
    return {
        "kind": scene.kind,
        "ground": scene.ground,
        "count": scene.count,
        "size": scene.size,
        "place": scene.place,
        "held_out": any(entity.held_out for entity, _ in shown),
        "entities": [
            {"codes": " ".join(e.codes), "name": e.name, "class_id": e.class_id, "box": list(box)} for e, box in shown
        ],
    }


def write_scenes(
    out: Path,
    *,
    num: int,
    split: Split,
    seed: int = 0,
    size: int = 128,
    font: str | Path | None = None,
    shard_size: int = 2000,
    on_item: Callable[[int, int], None] | None = None,
) -> Written:
    """Write `num` captioned scenes in img2dataset's layout. Scene i depends only on the seed, the split and i."""
    if size < 8:
        raise CorpusError(f"size must be at least 8 pixels, got {size}")
    glyphs = GlyphRenderer(font)
    table = load_entities()
    drawn = [entity for entity in select(table, split) if glyphs.draws(entity)]

    def sample(i: int) -> Sample:
        scene = sample_scene(np.random.default_rng([seed, i]), drawn)
        facts = scene_facts(scene, table) | {"font": glyphs.family, "license": glyphs.license}
        return Sample(pixels=render_scene(scene, glyphs, size), caption=scene.caption, metadata=facts)

    recipe = {
        "corpus": "emoji-scenes",
        "table": table_digest(),
        "seed": seed,
        "size": size,
        "split": split,
        "font": glyphs.family,
    }
    return write_shards(out, sample, num=num, shard_size=shard_size, recipe=recipe, on_item=on_item)


def _alone(rng: np.random.Generator, entity: Entity, ground: str) -> Scene:
    thing = noun(entity)
    return Scene(
        kind="alone",
        ground=ground,
        placements=(_placed(entity, (0.5, 0.5), ALONE_SIDE),),
        caption=_caption(rng, thing, with_article(thing), ground),
    )


def _at_place(rng: np.random.Generator, entity: Entity, ground: str) -> Scene:
    place = _pick(rng, tuple(PLACES))
    where = _pick(rng, PLACE_TEMPLATES.get(place, CORNER_TEMPLATES)).format(place=place)
    thing = noun(entity)
    return Scene(
        kind="placed",
        ground=ground,
        placements=(_placed(entity, PLACES[place], PLACED_SIDE),),
        caption=_caption(rng, f"{thing} {where}", f"{with_article(thing)} {where}", ground),
        place=place,
    )


def _sized(rng: np.random.Generator, entity: Entity, ground: str) -> Scene:
    size = _pick(rng, tuple(SIZED_SIDES))
    word = _pick(rng, SIZE_WORDS[size])
    thing = noun(entity)
    sized = f"{word} {thing}"
    # The article belongs to the noun: "a small wolf", but "small grapes".
    article = "a " if with_article(thing) != thing else ""
    where = " in the middle" if size == "small" else ""
    return Scene(
        kind="sized",
        ground=ground,
        placements=(_placed(entity, (0.5, 0.5), SIZED_SIDES[size]),),
        caption=_caption(rng, sized + where, article + sized + where, ground),
        size=size,
        place="middle" if size == "small" else None,
    )


def _counted(rng: np.random.Generator, entity: Entity, ground: str) -> Scene:
    count = _pick(rng, tuple(COUNTED_CENTERS))
    thing = noun(entity)
    plurals = plural(thing)
    if plurals and rng.random() < 0.6:
        things = f"{_pick(rng, (COUNT_WORDS[count], str(count)))} {plurals}"
    else:
        things = _pick(rng, COUNT_TEMPLATES).format(count=COUNT_WORDS[count], number=count, thing=thing)
    return Scene(
        kind="counted",
        ground=ground,
        placements=tuple(_placed(entity, center, COUNTED_SIDE) for center in COUNTED_CENTERS[count]),
        caption=_caption(rng, things, things, ground),
    )


def _two(rng: np.random.Generator, pair: tuple[Entity, Entity], ground: str) -> Scene:
    relation = _pick(rng, tuple(RELATIONS))
    first, second = (with_article(noun(entity)) for entity in pair)
    words = _pick(rng, RELATION_WORDS[relation])
    things = _pick(rng, TWO_TEMPLATES).format(a=first, b=second, relation=words)
    return Scene(
        kind="two",
        ground=ground,
        placements=tuple(
            _placed(entity, center, TWO_SIDE) for entity, center in zip(pair, RELATIONS[relation], strict=True)
        ),
        caption=_caption(rng, things, things, ground),
        place=relation,
    )


_ONE_ENTITY: dict[Kind, Callable[[np.random.Generator, Entity, str], Scene]] = {
    "alone": _alone,
    "placed": _at_place,
    "sized": _sized,
    "counted": _counted,
}


def _caption(rng: np.random.Generator, thing: str, a_thing: str, ground: str) -> str:
    """Say what is shown and on which ground, in one of several wordings."""
    on = _pick(rng, GROUND_TEMPLATES).format(ground=ground, a_ground=with_article(ground))
    return _pick(rng, SCENE_TEMPLATES).format(a=a_thing, thing=thing, on=on, ground=ground)


def _placed(entity: Entity, center: tuple[float, float], side: float) -> Placement:
    x, y = center
    left, top, right, bottom = (round(v, 6) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2))
    return Placement(entity=entity.position, box=(left, top, right, bottom))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]
