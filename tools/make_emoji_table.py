"""Make radt/corpora/emoji.json: entities, equivalence classes by pixels, and which classes are held out.

Needs Debian's unicode-data (emoji-test.txt), unicode-cldr-core (keywords) and fonts-noto-color-emoji (pixels):

    python tools/make_emoji_table.py radt/corpora/emoji.json
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float32

from radt.corpora.emoji import Entity, GlyphRenderer, compose, placement_layer

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
LINE = re.compile(r"(?P<codes>[0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (?P<name>.+)")

# Mean absolute difference, out of 255, of two glyphs composited at 32x32 on white and on black. Seen by eye: below
# it lie clocks among themselves, large and small squares of one colour, the costumes of man and woman superhero,
# Egypt and Yemen; above it begin the faces and people that one can tell apart.
NEAR = 3.25
# A held-out class must be at least this far from every other: nothing trained on may be almost its picture.
APART = 8.0
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where Debian's packages put the facts."""

    emoji_test: Path
    annotations: tuple[Path, ...]


def read_keywords(annotations: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Keywords by sequence; CLDR leaves out the variation selector, so we do too."""
    keywords: dict[str, tuple[str, ...]] = {}
    for path in annotations:
        for node in ElementTree.parse(path).iter("annotation"):
            if node.get("type") is None and node.text:
                keywords[node.attrib["cp"]] = tuple(plain(word.strip()) for word in node.text.split("|"))
    return keywords


def plain(text: str) -> str:
    """Typewriter quotes for curly ones: what a person types."""
    return text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})


def read_entities(sources: Sources) -> Iterator[Entity]:
    """Every fully-qualified emoji without a skin tone, in the order of the file."""
    keywords = read_keywords(sources.annotations)
    group = subgroup = ""
    position = 0
    for line in sources.emoji_test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif (found := LINE.match(line)) and not SKIN_TONES & set(found["codes"].split()):
            codes = tuple(found["codes"].split())
            bare = "".join(chr(int(code, 16)) for code in codes if code != "FE0F")
            yield Entity(
                position=position,
                codes=codes,
                name=plain(found["name"]),
                keywords=keywords.get(bare, ()),
                group=group,
                subgroup=subgroup,
                class_id=position,
                held_out=False,
            )
            position += 1


def glyph_distances(entities: Sequence[Entity], glyphs: GlyphRenderer) -> Float32[np.ndarray, "n n"]:
    """Mean absolute difference, 0 to 255, between every two glyphs at 32x32, on white and on black."""
    layers = np.stack([placement_layer(glyphs.glyph(e), (0.0, 0.0, 1.0, 1.0), 32) for e in entities])
    seen = np.concatenate([compose(layers, (255, 255, 255)), compose(layers, (0, 0, 0))], axis=-1)
    seen = seen.reshape(len(entities), -1).astype(np.float32)
    return np.stack([np.abs(seen - one).mean(axis=1) for one in seen])


def equivalence_classes(distances: Float32[np.ndarray, "n n"]) -> list[int]:
    """A class id per entity: single linkage of glyphs nearer than NEAR, numbered in order of first appearance."""
    root = list(range(len(distances)))
    for i, j in zip(*np.nonzero(np.triu(distances <= NEAR, k=1)), strict=True):
        low, high = sorted((root[i], root[j]))
        root = [low if r == high else r for r in root]
    numbers: dict[int, int] = {}
    return [numbers.setdefault(r, len(numbers)) for r in root]


def hold_out(entities: Sequence[Entity], distances: Float32[np.ndarray, "n n"]) -> set[int]:
    """A tenth of each group's classes, by hash. Passed over: classes that others look like or are named after."""
    class_ids = np.array([e.class_id for e in entities])
    others = np.where(class_ids[:, None] == class_ids, np.inf, distances)
    look_alike = set(class_ids[others.min(axis=1) < APART].tolist())
    said_by: dict[str, set[int]] = defaultdict(set)
    members: dict[int, list[Entity]] = defaultdict(list)
    groups: dict[str, set[int]] = defaultdict(set)
    for entity in entities:
        members[entity.class_id].append(entity)
        for phrase in (entity.name, *entity.keywords):
            said_by[phrase.lower()].add(entity.class_id)
    for class_id, twins in members.items():
        groups[twins[0].group].add(class_id)

    def is_eligible(class_id: int) -> bool:
        return class_id not in look_alike and all(said_by[e.name.lower()] == {class_id} for e in members[class_id])

    chosen: set[int] = set()
    for in_group in groups.values():
        eligible = sorted(filter(is_eligible, in_group), key=lambda c: stable_hash(members[c][0]))
        chosen.update(eligible[: round(HELD_OUT_SHARE * len(in_group))])
    return chosen


def stable_hash(entity: Entity) -> bytes:
    """The order of the draw: the same on every machine, and unmoved by entities added later."""
    return blake2b(" ".join(entity.codes).encode()).digest()


def to_line(entity: Entity) -> str:
    """One line of the table."""
    return json.dumps({
        "codes": entity.codes,
        "name": entity.name,
        "keywords": entity.keywords,
        "group": entity.group,
        "subgroup": entity.subgroup,
        "class_id": entity.class_id,
        "held_out": entity.held_out,
    })


def main() -> None:
    """Write the table and say what is in it."""
    unicode_dir = Path("/usr/share/unicode")
    parser = argparse.ArgumentParser(description="Make the emoji table.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--unicode", type=Path, default=unicode_dir, help="Debian's unicode-data and unicode-cldr-core")
    parser.add_argument("--font", type=Path, default=None)
    args = parser.parse_args()
    cldr = args.unicode / "cldr/common"
    sources = Sources(
        emoji_test=args.unicode / "emoji/emoji-test.txt",
        annotations=(cldr / "annotations/en.xml", cldr / "annotationsDerived/en.xml"),
    )
    glyphs = GlyphRenderer(args.font)
    listed = [entity for entity in read_entities(sources) if glyphs.draws(entity)]
    distances = glyph_distances(listed, glyphs)
    class_ids = equivalence_classes(distances)
    classed = [replace(e, position=i, class_id=class_ids[i]) for i, e in enumerate(listed)]
    chosen = hold_out(classed, distances)
    entities = [replace(e, held_out=e.class_id in chosen) for e in classed]
    args.out.write_text("[\n" + ",\n".join(to_line(e) for e in entities) + "\n]\n", encoding="ascii")
    held = [e for e in entities if e.held_out]
    print(f"{len(entities)} entities, {max(class_ids) + 1} classes; held out {len(held)} in {len(chosen)} classes")


if __name__ == "__main__":
    main()
