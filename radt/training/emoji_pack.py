"""Makes the training pack of the emoji demonstration: scenes of training entities, neighbours from a knowledge base.

The knowledge base holds training entities alone, so nothing of a held-out entity can reach the generator, not even as
a wrong neighbour. A scene is drawn from an entity's rendition 0, which is therefore never among its neighbours (R13).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from index.errors import ConfigError, CorpusError
from index.knowledge_base import KnowledgeBase
from index.records import Hit
from radt.corpora.emoji import Entity, GlyphRenderer, load_entities, placement_layer, select
from radt.corpora.scenes import KINDS, PALETTE, Kind, Scene, sample_scene
from radt.settings import By, Decompose, Fusion
from radt.text_encoder import TextEncoder
from radt.training.pack import Pack, TextTable

MIRRORED_KINDS = ("alone", "sized", "counted")  # their captions speak of no left and right
TURNED_KINDS = ("alone", "sized")  # and what they show stands in the middle
# More of the difficult ones than in the corpus: two things of one prompt, counts and places. The base stage has still
# more (`radt/presets.py`).
TRAINING_KINDS: dict[Kind, float] = {"alone": 0.45, "placed": 0.15, "sized": 0.05, "counted": 0.15, "two": 0.20}
TEXT_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """What goes into an emoji pack."""

    num_scenes: int = 12000
    num_entities: int | None = None  # the first so many training entities alone, for a small run; None = all
    seed: int = 0
    kinds: dict[Kind, float] = field(default_factory=lambda: dict(TRAINING_KINDS))
    candidates: int = 6
    by: By = "bm25"
    fusion: Fusion = "rrf"
    decompose: Decompose = "phrases"

    def __post_init__(self) -> None:
        for name in ("num_scenes", "candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_entities is not None and self.num_entities < 2:
            raise ConfigError(f"num_entities must be at least 2, since some scenes show two, got {self.num_entities}")
        if set(self.kinds) - set(KINDS) or min(self.kinds.values(), default=0) < 0 or not any(self.kinds.values()):
            raise ConfigError(f"kinds weighs {', '.join(KINDS)}, none below 0 and not all 0; got {self.kinds}")


def make_emoji_pack(
    config: PackConfig,
    *,
    image_size: int,
    kb: KnowledgeBase,
    text_encoder: TextEncoder,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Pack:
    """Draw the scenes, look their neighbours up, embed all captions. Deterministic in the configuration."""
    table = load_entities()
    glyphs = GlyphRenderer()
    entities = list(islice((entity for entity in select(table, "train") if glyphs.draws(entity)), config.num_entities))
    on_stage("drawing scenes")
    scenes = [
        sample_scene(np.random.default_rng([config.seed, i]), entities, kinds=config.kinds)
        for i in range(config.num_scenes)
    ]
    layers, scene_layer = _draw_layers(scenes, glyphs, image_size)
    on_stage("looking neighbours up")
    hits = _find_neighbors(config, scenes, table, kb)
    check_no_leak(hits, table)
    pictures, scene_neighbors, captions = _gather_pictures(hits, image_size, config.candidates)
    on_stage("embedding captions")
    return Pack(
        layers=layers,
        scene_layer=scene_layer,
        scene_ground=torch.tensor([PALETTE[scene.ground] for scene in scenes], dtype=torch.uint8),
        scene_mirrors=torch.tensor([scene.kind in MIRRORED_KINDS for scene in scenes]),
        scene_turns=torch.tensor([scene.kind in TURNED_KINDS for scene in scenes]),
        scene_text=_embed([scene.caption for scene in scenes], text_encoder),
        scene_neighbors=scene_neighbors,
        pictures=pictures,
        picture_text=_embed(captions, text_encoder),
    )


def check_no_leak(hits: Sequence[Sequence[Hit]], table: Sequence[Entity]) -> None:
    """Refuse neighbours that show a held-out entity."""
    held_out = {" ".join(entity.codes) for entity in table if entity.held_out}
    for hit in (hit for found in hits for hit in found):
        codes = hit.metadata.get("codes")
        if isinstance(codes, list):
            codes = " ".join(codes)
        if codes in held_out:
            raise CorpusError(
                f"pair {hit.id} ({hit.caption!r}) shows a held-out entity: train from a knowledge base of "
                "`radt corpus emoji --split train`"
            )


def check_no_own(hits: Sequence[Sequence[Hit]], own: Sequence[Sequence[int]]) -> None:
    """Refuse neighbours that are the record their scene was drawn from; `own` are the ids of those, scene by scene."""
    for place, (found, ids) in enumerate(zip(hits, own, strict=True)):
        for hit in found:
            if hit.id in ids:
                raise CorpusError(
                    f"pair {hit.id} ({hit.caption!r}) is what scene {place} was drawn from, and was found as its "
                    "neighbour: the knowledge base does not obey `exclude`; build it again with this version"
                )


def _draw_layers(scenes: Sequence[Scene], glyphs: GlyphRenderer, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One premultiplied RGBA layer for each distinct arrangement, and each scene's row in them."""
    rows: dict[tuple[tuple[int, tuple[float, ...]], ...], int] = {}
    layers: list[np.ndarray] = []
    scene_layer = []
    for scene in scenes:
        arrangement = tuple((placement.entity, placement.box) for placement in scene.placements)
        if arrangement not in rows:
            rows[arrangement] = len(layers)
            layers.append(draw_layer(scene, glyphs, size))
        scene_layer.append(rows[arrangement])
    return torch.from_numpy(np.stack(layers)), torch.tensor(scene_layer)


def draw_layer(scene: Scene, glyphs: GlyphRenderer, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """What a scene shows, without its ground, as it lies in a pack: premultiplied RGBA."""
    drawn = [placement_layer(glyphs[placement.entity], placement.box, size) for placement in scene.placements]
    return _stack_layers(drawn)


def _stack_layers(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Premultiplied layers over one another."""
    stacked: np.ndarray = layers[0].astype(np.float32)
    for layer in layers[1:]:
        stacked = layer + stacked * (1 - layer[..., 3:] / np.float32(255))
    return stacked.round().clip(0, 255).astype(np.uint8)


def _find_neighbors(
    config: PackConfig, scenes: Sequence[Scene], table: Sequence[Entity], kb: KnowledgeBase
) -> list[list[Hit]]:
    """The best neighbours of every scene's caption, the drawn renditions left out."""
    own = _ids_of_rendition_zero(kb)
    exclude = [[own[" ".join(table[p.entity].codes)] for p in scene.placements] for scene in scenes]
    hits = kb.retriever.search_many(
        [scene.caption for scene in scenes],
        k=config.candidates,
        by=config.by,
        fusion=config.fusion,
        decompose=config.decompose,
        exclude=exclude,
    )
    check_no_own(hits, exclude)
    return hits


def _ids_of_rendition_zero(kb: KnowledgeBase) -> dict[str, int]:
    found = {}
    for pair in kb.store.get(kb.store.matching_ids()):
        if pair.metadata["rendition"] == 0:
            codes = pair.metadata["codes"]
            found[codes if isinstance(codes, str) else " ".join(codes)] = pair.id
    return found


def _gather_pictures(
    hits: Sequence[Sequence[Hit]], size: int, candidates: int
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Every picture that is somebody's neighbour, once; each scene's rows in them; their captions."""
    rows: dict[int, int] = {}
    pictures, captions = [], []
    neighbors = torch.full((len(hits), candidates), -1)
    for scene, found in enumerate(hits):
        for place, hit in enumerate(found):
            if hit.id not in rows:
                rows[hit.id] = len(rows)
                pictures.append(np.asarray(hit.open_image().resize((size, size), Image.Resampling.LANCZOS)))
                captions.append(hit.caption)
            neighbors[scene, place] = rows[hit.id]
    return torch.from_numpy(np.stack(pictures)), neighbors, captions


def _embed(captions: Sequence[str], text_encoder: TextEncoder) -> TextTable:
    batches = [list(captions[start : start + TEXT_BATCH]) for start in range(0, len(captions), TEXT_BATCH)]
    return TextTable.from_conditions([text_encoder.encode(batch) for batch in batches])
