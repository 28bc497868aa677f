"""Nothing of a held-out entity may reach training, nor a scene's own record its neighbours (rows R13, R17).

A name, a keyword or a word counts as held out when no training entity has it: "face" and "flag" are everybody's. A
picture counts as held out when it is, pixel for pixel, a rendition that the corpus draws of a held-out entity.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from index.errors import CorpusError
from radt.corpora import scenes
from radt.corpora.emoji import Entity, GlyphRenderer, load_entities, render_rendition, rendition, select
from radt.corpora.wording import COUNT_WORDS, noun, plural
from radt.training.emoji_pack import PackConfig, draw_layer
from radt.training.pack import Pack
from radt.training.precompute import Captions

RENDITIONS = 4  # of an entity, as `radt corpus emoji` draws by default
CORPUS_SIZE = 128
FONT_CHECKED = 100  # entities, the first ones: a pack of a few entities has those too
SHADE = 8  # of 8 bits, in any channel of any pixel
Arrangement: TypeAlias = tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """Where something lies that must not, and what it is."""

    where: str
    what: str


class HeldOutWords:
    """The words and phrases that belong to held-out entities alone.

    Not theirs is what a training entity makes with the words of a scene that follow it: "a pick up at the top".
    """

    def __init__(self, table: Sequence[Entity]) -> None:
        trained = [phrase for entity in table if not entity.held_out for phrase in phrases_of(entity)]
        common = {word for phrase in [*trained, *_scene_phrases()] for word in phrase}
        inside = {part for phrase in trained for part in _parts(phrase)}
        ends = {phrase[start:] for phrase in trained for start in range(len(phrase))}
        after = {phrase[:end] for phrase in _scene_phrases() for end in range(1, len(phrase) + 1)}
        held_out = {phrase for entity in table if entity.held_out for phrase in phrases_of(entity)}
        own = (phrase for phrase in held_out if phrase not in inside)
        self.phrases = frozenset(
            phrase
            for phrase in own
            if not any(phrase[:i] in ends and phrase[i:] in after for i in range(1, len(phrase)))
        )
        self.words = frozenset(word for phrase in held_out for word in phrase if word not in common)
        names = " / ".join(entity.name for entity in table if not entity.held_out)
        with_commas = [entity.name for entity in table if entity.held_out and "," in entity.name]
        self.with_commas = [name for name in with_commas if name not in names]  # "family: woman, boy" is in "..., boy"
        self._longest = max(map(len, self.phrases), default=0)

    def found_in(self, text: str) -> list[str]:
        """What of them a text says: a word of theirs alone, or a whole name or keyword, plural or not.

        But for names that have one, nothing reaches over a comma: "cold, face" are two keywords and not the cold face.
        """
        clauses = [words_of(clause) for clause in text.split(",")]
        parts = {part for words in clauses for part in _parts(words, longest=self._longest) if part in self.phrases}
        names = {name for name in self.with_commas if name.lower() in text.lower()}
        words = self.words & {word for words in clauses for word in words}
        return sorted({" ".join(part) for part in parts} | words | names)


def leaks_in_texts(texts: Iterable[str], *, where: str, table: Sequence[Entity] | None = None) -> Iterator[Leak]:
    """Texts that name a held-out entity."""
    theirs = HeldOutWords(load_entities() if table is None else table)
    for text in texts:
        for said in theirs.found_in(text):
            yield Leak(where=where, what=f"{text!r} says {said!r}")


def leaks_in_records(records: Iterable[Mapping[str, Any]], *, where: str) -> Iterator[Leak]:
    """Records of a corpus that are of a held-out entity, by their codes."""
    held_out = {" ".join(entity.codes): entity.name for entity in load_entities() if entity.held_out}
    for record in records:
        codes = record.get("codes")
        codes = codes if isinstance(codes, str) else " ".join(codes or ())
        if codes in held_out or record.get("held_out"):
            yield Leak(where=where, what=f"{record.get('key')} shows {held_out.get(codes, record.get('name'))!r}")


def leaks_in_corpus(folder: Path) -> Iterator[Leak]:
    """Records and captions of a corpus folder in img2dataset's layout. Its pictures are looked at in the pack."""
    import pyarrow.parquet as pq

    tables = sorted(folder.glob("*.parquet"))
    if not tables:
        raise CorpusError(f"{folder} holds no corpus")
    rows = [row for table in tables for row in pq.read_table(table).to_pylist()]
    yield from leaks_in_records(rows, where=folder.name)
    yield from leaks_in_texts((row["caption"] for row in rows), where=folder.name)


def leaks_in_pictures(pack: Pack, glyphs: GlyphRenderer) -> Iterator[Leak]:
    """Neighbours of a pack that are a picture of a held-out entity, pixel for pixel. CorpusError for another font's."""
    rows = _rows_by_pixels(pack)
    _check_font(rows, pack, glyphs)
    for entity in load_entities():
        if entity.held_out and glyphs.draws(entity):
            for number in range(RENDITIONS):
                for row in rows.get(_as_in_pack(glyphs, entity, number, pack), ()):
                    yield Leak(where="pack", what=f"picture {row} is rendition {number} of {entity.name!r}")


def leaks_in_targets(pack: Pack, captions: Captions, config: PackConfig, glyphs: GlyphRenderer) -> list[Leak]:
    """Scenes that do not show what their lot draws, which is of training entities alone. Raises as `own_records` does.

    Resampling may differ by a shade from version to version; another glyph, however like, differs by more than `SHADE`.
    Where not one scene is as drawn here, nor any neighbour, the pack is another font's: a CorpusError.
    """
    known: dict[tuple[int, Arrangement], int] = {}
    leaks = []
    for place, scene in _drawn_again(captions, config, glyphs):
        row = int(pack.scene_layer[place])
        shown = row, tuple((placement.entity, placement.box) for placement in scene.placements)
        if shown not in known:
            expected = draw_layer(scene, glyphs, pack.size[0]).astype(np.int16)
            known[shown] = int(np.abs(pack.layers[row].cpu().numpy() - expected).max())
        if known[shown] > SHADE:
            what = f"scene {place} ({scene.caption!r}) shows something else than its caption's training entities"
            leaks.append(Leak(where="pack", what=what))
    if leaks and min(known.values()) > SHADE:
        _check_font(_rows_by_pixels(pack), pack, glyphs)
    return leaks


def own_records(pack: Pack, captions: Captions, config: PackConfig, glyphs: GlyphRenderer) -> Iterator[Leak]:
    """Scenes whose neighbours hold the very record that the scene is drawn from: rendition 0 of what it shows.

    The scenes are drawn by lot from the pack's configuration, so which entities they show is found by drawing again; a
    CorpusError where that gives other captions, as after a change of the corpus, or where the pack is another font's.
    """
    table = load_entities()
    rows = _rows_by_pixels(pack)
    _check_font(rows, pack, glyphs)
    own: dict[int, set[int]] = {}
    for place, scene in _drawn_again(captions, config, glyphs):
        neighbors = set(pack.scene_neighbors[place].tolist())
        for entity in {placement.entity for placement in scene.placements}:
            if entity not in own:
                own[entity] = set(rows.get(_as_in_pack(glyphs, table[entity], 0, pack), ()))
            if own[entity] & neighbors:
                what = f"scene {place} ({scene.caption!r}) has its own record among its neighbours"
                yield Leak(where="pack", what=what)


def _drawn_again(captions: Captions, config: PackConfig, glyphs: GlyphRenderer) -> Iterator[tuple[int, scenes.Scene]]:
    """Every scene of a pack, by lot as when it was made. CorpusError where a caption is another one."""
    trained = (entity for entity in select(load_entities(), "train") if glyphs.draws(entity))
    entities = list(islice(trained, config.num_entities))
    for place, caption in enumerate(captions.scenes):
        scene = scenes.sample_scene(np.random.default_rng([config.seed, place]), entities, kinds=config.kinds)
        if scene.caption != caption:
            raise CorpusError(f"scene {place} of the pack is {caption!r}, and drawn again it is {scene.caption!r}")
        yield place, scene


def phrases_of(entity: Entity) -> set[tuple[str, ...]]:
    """Name and keywords as words, and the name as a sentence has it, in the plural too."""
    said = noun(entity)
    return {words_of(text) for text in (entity.name, said, plural(said) or said, *entity.keywords)} - {()}


def words_of(text: str) -> tuple[str, ...]:
    """Lower case, letters and figures alone."""
    return tuple("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _scene_phrases() -> Iterator[tuple[str, ...]]:
    """Everything that a scene's caption says beside the names of its entities."""
    wordings = (scenes.PLACE_TEMPLATES, scenes.SIZE_WORDS, scenes.RELATION_WORDS)
    groups: list[Iterable[str]] = [
        *(scenes.SCENE_TEMPLATES, scenes.GROUND_TEMPLATES, scenes.CORNER_TEMPLATES, scenes.COUNT_TEMPLATES),
        *(scenes.TWO_TEMPLATES, scenes.PALETTE, scenes.PLACES, COUNT_WORDS.values(), map(str, COUNT_WORDS)),
        *(words for wording in wordings for words in wording.values()),
        ("an", "in the middle"),
    ]
    return (words_of(text) for group in groups for text in group)


def _parts(words: tuple[str, ...], *, longest: int | None = None) -> Iterator[tuple[str, ...]]:
    """Every run of words within a text, up to a length."""
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + (longest or len(words))) + 1):
            yield words[start:end]


def _rows_by_pixels(pack: Pack) -> dict[bytes, list[int]]:
    rows: dict[bytes, list[int]] = {}
    for row, picture in enumerate(pack.pictures.cpu().numpy()):
        rows.setdefault(picture.tobytes(), []).append(row)
    return rows


def _check_font(rows: Mapping[bytes, Sequence[int]], pack: Pack, glyphs: GlyphRenderer) -> None:
    """CorpusError where no picture of the pack is as this font draws it: then nothing can be told of any."""
    drawn = islice((entity for entity in load_entities() if glyphs.draws(entity)), FONT_CHECKED)
    if not any(_as_in_pack(glyphs, entity, number, pack) in rows for entity in drawn for number in range(RENDITIONS)):
        raise CorpusError("the pack was drawn with another font than this machine's, or resized otherwise")


def _as_in_pack(glyphs: GlyphRenderer, entity: Entity, number: int, pack: Pack) -> bytes:
    """A rendition as it would lie in the pack: drawn for the corpus, and resized as `emoji_pack` does."""
    picture = Image.fromarray(render_rendition(glyphs.glyph(entity), rendition(entity, number), CORPUS_SIZE))
    height, width = pack.size
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)).tobytes()
