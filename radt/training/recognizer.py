"""Training of the emoji recogniser: glyphs of the installed font, composed by lot as they are needed.

A picture of a batch is one emoji, scaled, turned and shifted a little, on a ground of any colour, as sharp or as
coarse as the pictures that are judged, some with a piece of another emoji at the edge. A batch is a function of the
seed and the step alone. The recogniser sees held-out entities: it judges, and is no part of what is judged.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate

from index.errors import ConfigError
from radt.recognizer_network import RecognizerConfig, RecognizerNetwork, crop_box, save_recognizer, to_frame
from radt.shapes import PerExample, Pixels, Pooled
from radt.training.follow import OnStep, follow
from radt.training.metrics import forget_after
from radt.training.module_run import ModuleRun, claim_folder, write_json
from radt.training.optim import OptimConfig, learning_rate, make_optimizer

if TYPE_CHECKING:  # the corpora need Pillow and a font, a configuration does not
    from radt.corpora.emoji import Entity
    from radt.corpora.scenes import Glyphs

STATE_FILE, METRICS_FILE, ACCURACY_FILE = "state.safetensors", "metrics.jsonl", "accuracy.json"
MODEL_FOLDER = "recognizer"
GLYPH_SIDE = 64
PIXELS_SEEN = (12, 14, 16, 20, 25, 32, 48, 64)  # sides of the crops that are judged, in pixels of the picture
CLUTTER_SHIFT = (0.85, 1.15)  # where the centre of another emoji lies, in frames
MEASURED_SIZES = (128, 32)
CHUNK = 256  # pictures a network call, when measuring


@dataclass(frozen=True, kw_only=True, slots=True)
class RecognizerTrainConfig:
    """Sizes, duration, and how much a picture may differ from the font's. `num_steps` are of `batch_size` pictures."""

    network: RecognizerConfig = field(default_factory=RecognizerConfig)
    num_steps: int
    batch_size: int
    optim: OptimConfig
    least_scale: float = 0.62  # of the emoji's larger side, as a share of the frame
    most_scale: float = 1.04
    angle: float = 10.0  # degrees to either side
    shift: float = 0.06  # frames, beyond what keeps the emoji within it
    gain: float = 0.12  # of each channel, to either side
    noise: float = 0.04  # standard deviation at most, of values in [-1, 1]
    clutter_prob: float = 0.15
    palette_prob: float = 0.6  # a ground of the scenes or the corpus; else any colour
    label_smoothing: float = 0.05
    precision: str = "bf16"  # of the forward pass; "no" = float32 throughout
    seed: int = 0
    log_every: int = 20
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2: a batch is normalised by its own spread")
        if not 0 < self.least_scale <= self.most_scale:
            raise ConfigError(f"scales go from above 0 up, got {self.least_scale} to {self.most_scale}")
        for name in ("clutter_prob", "palette_prob", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.precision not in ("bf16", "no"):
            raise ConfigError(f"precision is bf16 or no, got {self.precision!r}")


def recognizer_emoji() -> RecognizerTrainConfig:
    """The recogniser of EmojiDrawBench: 1.4 M parameters, about a quarter of an hour of one core."""
    optim = OptimConfig(lr=3e-3, weight_decay=0.02, warmup_steps=150, cooldown_share=0.9)
    return RecognizerTrainConfig(num_steps=2600, batch_size=192, optim=optim)


class GlyphPictures:
    """Batches of pictures and their classes, composed in torch from glyphs that were drawn once.

    `classes` are the class ids in the order of the network's logits.
    """

    def __init__(self, entities: "Sequence[Entity]", glyphs: "Glyphs", *, config: RecognizerTrainConfig) -> None:
        from radt.corpora.emoji import GROUNDS, placement_layer
        from radt.corpora.scenes import PALETTE

        self.config = config
        self.classes = tuple(sorted({entity.class_id for entity in entities}))
        self.layers = torch.from_numpy(
            np.stack([
                placement_layer(glyphs[entity.position], (0.0, 0.0, 1.0, 1.0), GLYPH_SIDE).transpose(2, 0, 1)
                for entity in entities
            ])
        )
        index = {class_id: place for place, class_id in enumerate(self.classes)}
        self.labels = torch.tensor([index[entity.class_id] for entity in entities])
        known = [*PALETTE.values(), *(color for _, color in GROUNDS)]
        self.grounds = torch.tensor(known, dtype=torch.float32) / 255

    def batch(self, step: int) -> tuple[Pixels, Int[Tensor, " b"]]:
        """One step's pictures in [-1, 1], and their classes' places."""
        config, n = self.config, self.config.batch_size
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.layers), (n,), generator=rng)
        layers = self._placed(chosen, rng)
        canvas = self._grounds(n, rng)[:, :, None, None].expand(-1, -1, GLYPH_SIDE, GLYPH_SIDE)
        canvas = self._with_clutter(canvas, rng)
        canvas = layers[:, :3] + (1 - layers[:, 3:]) * canvas
        gains = 1 + config.gain * (2 * torch.rand(n, 3, 1, 1, generator=rng) - 1)
        pixels = _as_coarse(canvas * gains, config.network.image_size, rng) * 2 - 1
        noise = config.noise * torch.rand(n, 1, 1, 1, generator=rng)
        pixels = pixels + noise * torch.randn(pixels.shape, generator=rng)
        return pixels.clamp(-1, 1), self.labels[chosen]

    def _placed(self, chosen: Int[Tensor, " b"], rng: torch.Generator) -> Float[Tensor, "b 4 side side"]:
        config, n = self.config, len(chosen)
        scale = config.least_scale + (config.most_scale - config.least_scale) * torch.rand(n, generator=rng)
        angle = math.radians(config.angle) * (2 * torch.rand(n, generator=rng) - 1)
        room = ((1 - scale).clamp(min=0) / 2 + config.shift)[:, None]
        shift = room * (2 * torch.rand(n, 2, generator=rng) - 1)
        return _warp(self.layers[chosen], scale=scale, angle=angle, shift=shift)

    def _grounds(self, n: int, rng: torch.Generator) -> Float[Tensor, "b 3"]:
        known = self.grounds[torch.randint(len(self.grounds), (n,), generator=rng)]
        free = torch.rand(n, 3, generator=rng)
        return torch.where(torch.rand(n, 1, generator=rng) < self.config.palette_prob, known, free)

    def _with_clutter(self, canvas: Float[Tensor, "b 3 h w"], rng: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """Pieces of other emoji at one side of some pictures, as where two stand side by side."""
        n = len(canvas)
        cluttered = (torch.rand(n, generator=rng) < self.config.clutter_prob).nonzero().flatten()
        if not len(cluttered):
            return canvas
        m = len(cluttered)
        other = torch.randint(len(self.layers), (m,), generator=rng)
        low, high = CLUTTER_SHIFT
        far = (low + (high - low) * torch.rand(m, generator=rng)) * (torch.randint(2, (m,), generator=rng) * 2 - 1)
        near = 0.3 * (torch.rand(m, generator=rng) - 0.5)
        sideways = (torch.rand(m, generator=rng) < 0.5)[:, None]
        shift = torch.where(sideways, torch.stack([far, near], 1), torch.stack([near, far], 1))
        layers = _warp(self.layers[other], scale=torch.full((m,), 0.9), angle=torch.zeros(m), shift=shift)
        canvas = canvas.clone()
        canvas[cluttered] = layers[:, :3] + (1 - layers[:, 3:]) * canvas[cluttered]
        return canvas


def _warp(
    layers: UInt8[Tensor, "b 4 side side"], *, scale: PerExample, angle: PerExample, shift: Float[Tensor, "b 2"]
) -> Float[Tensor, "b 4 side side"]:
    """Scale, turn and shift layers within their frames; the shift is right and down, in frames."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    offset = -(rows @ (2 * shift)[:, :, None])
    grid = affine_grid(torch.cat([rows, offset], 2), [len(layers), 4, GLYPH_SIDE, GLYPH_SIDE], align_corners=False)
    return grid_sample(layers.float() / 255, grid, mode="bilinear", align_corners=False)


def _as_coarse(canvas: Float[Tensor, "b 3 h w"], side: int, rng: torch.Generator) -> Float[Tensor, "b 3 side side"]:
    """As if each picture had been drawn in so many pixels and enlarged to `side`: a quarter of the batch each size."""
    parts = []
    for part in canvas.chunk(4):
        seen = PIXELS_SEEN[int(torch.randint(len(PIXELS_SEEN), (), generator=rng))]
        parts.append(_resized(_resized(part, seen), side))
    return torch.cat(parts)


def _resized(pictures: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    if pictures.shape[-1] == side:
        return pictures
    return interpolate(pictures, (side, side), mode="bilinear", antialias=True, align_corners=False)


def train_recognizer(
    config: RecognizerTrainConfig,
    out: Path,
    *,
    entities: "Sequence[Entity] | None" = None,
    glyphs: "Glyphs | None" = None,
    on_step: OnStep = lambda _: None,
) -> Path:
    """Train to `config.num_steps`, from the saved state in `out` if there is one; returns the recogniser's folder.

    Args:
        config: sizes and duration.
        out: the run folder. When training is over, `accuracy.json` in it says what true scenes score.
        entities: the emoji to tell apart, by default all of the table that the font draws.
        glyphs: their pictures, by default the installed font's.
        on_step: called with the metrics of every step.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
        ConfigError: `out` holds a run of another configuration.
        DivergedError: the loss or the gradient is not finite; the last good state stays.
    """
    if glyphs is None:
        from radt.corpora.emoji import GlyphRenderer, load_entities

        glyphs = font = GlyphRenderer()
        entities = [entity for entity in entities or load_entities() if font.draws(entity)]
    assert entities, "there is no entity to tell from others"
    claim_folder(out, config)
    torch.manual_seed(config.seed)
    pictures = GlyphPictures(entities, glyphs, config=config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = RecognizerNetwork(config.network, len(pictures.classes)).to(device)
    network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    run = ModuleRun(module=network, optimizer=make_optimizer(network, config.optim))
    run.load(out / STATE_FILE)
    forget_after(out / METRICS_FILE, run.step)
    follow(
        _steps(config, run, pictures),
        config,
        state=out / STATE_FILE,
        log=out / METRICS_FILE,
        save=lambda: run.save(out / STATE_FILE),
        on_step=on_step,
    )
    save_recognizer(out / MODEL_FOLDER, network, pictures.classes)
    measured = measure_accuracy(network.cpu().eval(), pictures.classes, entities, glyphs)
    write_json(out / ACCURACY_FILE, measured)
    return out / MODEL_FOLDER


def _steps(config: RecognizerTrainConfig, run: ModuleRun, pictures: GlyphPictures) -> Iterator[dict[str, float]]:
    """Take the steps from `run.step` to the end, yielding the metrics of each."""
    network = run.module.train()
    device = next(network.parameters()).device
    while run.step < config.num_steps:
        began = time.monotonic()
        rate = learning_rate(run.step, config.num_steps, config.optim)
        run.set_rate(rate)
        pixels, labels = (each.to(device) for each in pictures.batch(run.step))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = network(pixels.to(memory_format=torch.channels_last))
        loss = cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.optim.max_grad_norm)
        run.optimizer.step()
        run.step += 1
        yield {
            "step": run.step,
            "images_seen": run.step * config.batch_size,
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "lr": rate,
            "images_per_second": config.batch_size / (time.monotonic() - began),
        }


def measure_accuracy(
    network: RecognizerNetwork, classes: Sequence[int], entities: "Sequence[Entity]", glyphs: "Glyphs"
) -> dict[str, Any]:
    """Top-1 and top-5 by class on true scenes of every entity, each emoji cropped by its true box.

    `alone` is as large as the plainest scene has it, `counted` the smallest that scenes have; grounds by lot.
    """
    from radt.corpora.scenes import ALONE_SIDE, COUNTED_SIDE, PALETTE

    rng = np.random.default_rng(7)
    grounds = [list(PALETTE)[int(place)] for place in rng.integers(len(PALETTE), size=len(entities))]
    report: dict[str, Any] = {"entities": len(entities), "classes": len(classes)}
    held_out = np.array([entity.held_out for entity in entities])
    for size in MEASURED_SIZES:
        for name, side in (("alone", ALONE_SIDE), ("counted", COUNTED_SIDE)):
            ranks = _ranks(
                network, classes, entities, _crops(entities, glyphs, grounds, (size, side, network.config.image_size))
            )
            report[f"{name}_{size}"] = {
                "top1": float((ranks == 1).mean()),
                "top5": float((ranks <= 5).mean()),
                "top1_held_out": float((ranks[held_out] == 1).mean()) if held_out.any() else None,
            }
    return report


def _crops(
    entities: "Sequence[Entity]", glyphs: "Glyphs", grounds: Sequence[str], sides: tuple[int, float, int]
) -> UInt8[np.ndarray, "n side side 3"]:
    """Every entity in the middle of a scene of so many pixels, cropped by its box of this side to so many pixels."""
    from radt.corpora.scenes import Placement, Scene, render_scene

    size, share, side = sides
    box = ((1 - share) / 2, (1 - share) / 2, (1 + share) / 2, (1 + share) / 2)
    scenes = [
        Scene(kind="alone", ground=ground, placements=(Placement(entity=entity.position, box=box),), caption="")
        for entity, ground in zip(entities, grounds, strict=True)
    ]
    return np.stack([crop_box(render_scene(scene, glyphs, size), box, side) for scene in scenes])


@torch.no_grad()
def _ranks(
    network: RecognizerNetwork,
    classes: Sequence[int],
    entities: "Sequence[Entity]",
    crops: UInt8[np.ndarray, "n side side 3"],
) -> Int[np.ndarray, " n"]:
    """The place of each entity's own class, from 1; behind all where its score is not a number."""
    logits: Pooled = torch.cat([
        network(to_frame(crops[start : start + CHUNK], network.config.image_size))
        for start in range(0, len(crops), CHUNK)
    ])
    columns = torch.tensor(np.searchsorted(classes, [entity.class_id for entity in entities]))
    own = logits.gather(1, columns[:, None])
    return (~(logits < own)).sum(1).numpy()  # so that NaN is never right
