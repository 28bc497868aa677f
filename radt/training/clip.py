"""Training the demonstration's CLIP: its retrieval embedder and its text encoder (Radford et al. 2021).

The model is open_clip's own `CLIP`, the loss open_clip's own `ClipLoss`, and the result loads in open_clip as
`local-dir:PATH`. The pairs come from `emoji_pairs.py`, the vocabulary from `tokenizer.py`. The run folder holds

    config.json  tokenizer.json  state.safetensors  metrics.jsonl     from the start
    recall.json  clip/                                                when training is over

and the same call on the same folder resumes from the last saved state.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from index.atomic import new_folder, write_bytes
from index.errors import ConfigError
from radt.shapes import Pixels, Pooled
from radt.training.follow import OnStep, follow
from radt.training.metrics import forget_after
from radt.training.module_run import ModuleRun, claim_folder, write_json
from radt.training.optim import OptimConfig, learning_rate, make_optimizer
from radt.training.tokenizer import PAD_ID, encode, load_tokenizer, save_tokenizer, train_tokenizer

if TYPE_CHECKING:  # the corpora need Pillow and a font, a configuration does not
    from radt.corpora.emoji import Entity, GlyphRenderer
    from radt.training.emoji_pairs import EmojiPairs

Clip: TypeAlias = Any  # open_clip.CLIP, which has no types

STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
UNSEEN_RENDITION = 1_000_003  # drawn by lot as all are, and numbered beyond any that is trained on
VOCABULARY_SCENES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTrainConfig:
    """Sizes of the model and how long it trains. `num_steps` are optimiser steps of `batch_size` pairs."""

    image_size: int = 32
    patch_size: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4
    embed_dim: int = 128
    context_length: int = 32
    vocab_size: int = 2000
    num_steps: int
    batch_size: int
    optim: OptimConfig
    renditions: int = 8
    precision: str = "bf16"  # of the forward pass; "no" = float32 throughout
    seed: int = 0
    log_every: int = 10
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "renditions", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ConfigError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}, "
                f"and width {self.width} of heads {self.heads}"
            )


def clip_emoji() -> ClipTrainConfig:
    """The CLIP that ships in the demonstration bundle: 1.9 M parameters, about a quarter of an hour on one core."""
    optim = OptimConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1, warmup_steps=50, cooldown_share=0.5)
    return ClipTrainConfig(num_steps=1300, batch_size=256, optim=optim)


def train_clip(
    config: ClipTrainConfig,
    out: Path,
    *,
    entities: "Sequence[Entity] | None" = None,
    on_step: OnStep = lambda _: None,
) -> Path:
    """Train to `config.num_steps`, from the saved state in `out` if there is one, and return the open_clip folder.

    Args:
        config: sizes and duration.
        out: the run folder.
        entities: the emoji to learn from and to be measured on, by default the whole table. Held-out ones among them
            are only measured on, in `recall.json`, when training is over.
        on_step: called with the metrics of every step.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
        DivergedError: the loss is no number any more; the last state that was saved is kept.
        ConfigError: `out` holds a run of another configuration.
    """
    from accelerate import Accelerator

    from radt.corpora.emoji import GlyphRenderer, load_entities, select
    from radt.training.emoji_pairs import EmojiPairs

    entities = load_entities() if entities is None else entities
    training, glyphs = select(entities, "train"), GlyphRenderer()
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
    claim_folder(out, config)
    tokenizer = _run_tokenizer(out, config, training)
    torch.manual_seed(config.seed)
    model = make_clip(config, vocab_size=tokenizer.get_vocab_size()).to(accelerator.device)
    run = ModuleRun(module=model, optimizer=make_optimizer(model, config.optim))
    run.load(out / STATE_FILE)
    pairs = EmojiPairs(training, glyphs, image_size=config.image_size, renditions=config.renditions, seed=config.seed)
    forget_after(out / METRICS_FILE, run.step)
    is_main = accelerator.is_main_process
    follow(
        train_steps(config, run, pairs, tokenizer=tokenizer, accelerator=accelerator),
        config,
        state=out / STATE_FILE,
        log=out / METRICS_FILE if is_main else None,
        save=lambda: run.save(out / STATE_FILE) if is_main else None,
        on_step=on_step,
    )
    if is_main:
        write_json(out / "recall.json", measure_recall(model, tokenizer, entities, glyphs))
        export_clip(model, tokenizer, config, out / "clip")
    accelerator.wait_for_everyone()
    return out / "clip"


def train_steps(
    config: ClipTrainConfig, run: ModuleRun, pairs: "EmojiPairs", *, tokenizer: Any, accelerator: Any
) -> Iterator[dict[str, float]]:
    """Take the steps from `run.step` to the end, yielding the metrics of each."""
    from open_clip.loss import ClipLoss

    rank, world_size = accelerator.process_index, accelerator.num_processes
    if config.batch_size % world_size:
        raise ConfigError(f"batch_size {config.batch_size} must be a multiple of the {world_size} processes")
    model, optimizer = accelerator.prepare(run.module, run.optimizer)
    clip_loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    device = accelerator.device
    run.module.train()
    while run.step < config.num_steps:
        began = time.monotonic()
        rate = learning_rate(run.step, config.num_steps, config.optim)
        run.set_rate(rate)
        pictures, captions = pairs.batch(run.step, config.batch_size)
        pixels = to_pixels(torch.from_numpy(pictures[rank::world_size])).to(device)
        tokens = tokenize(tokenizer, captions[rank::world_size], config.context_length).to(device)
        output = model(pixels, tokens)
        loss = clip_loss(**output)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        with torch.no_grad():
            run.module.get_parameter("logit_scale").clamp_(0, MAX_LOGIT_SCALE)
        run.step += 1
        yield {
            "step": run.step,
            "images_seen": run.step * config.batch_size,
            "loss": loss.item(),
            "accuracy": in_batch_accuracy(output["text_features"], output["image_features"]),
            "lr": rate,
            "logit_scale": output["logit_scale"].item(),
            "images_per_second": config.batch_size / (time.monotonic() - began),
        }


def model_config(config: ClipTrainConfig, *, vocab_size: int) -> dict[str, Any]:
    """The `model_cfg` of open_clip. Its tokenizer lies in the same folder, so the name only has to be there."""
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.width,
            "layers": config.layers,
            "head_width": config.width // config.heads,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": "tokenizer.json",
            "width": config.width,
            "layers": config.layers,
            "heads": config.heads,
            "pad_id": PAD_ID,
            "pool_type": "argmax",  # END has the highest id
        },
    }


def make_clip(config: ClipTrainConfig, *, vocab_size: int) -> Clip:
    """Make open_clip's CLIP of these sizes, with random weights."""
    from open_clip import CLIP

    return CLIP(**model_config(config, vocab_size=vocab_size), output_dict=True)


def to_pixels(pictures: UInt8[Tensor, "b h w 3"]) -> Pixels:
    """RGB bytes to [-1, 1], as the saved preprocessing with mean and deviation 0.5 does."""
    return rearrange(pictures, "b h w c -> b c h w").float() / 127.5 - 1


def tokenize(tokenizer: Any, texts: Sequence[str], context_length: int) -> Int[Tensor, "b n"]:
    """Token ids of captions, cut or padded to the context length."""
    return torch.tensor(encode(tokenizer, list(texts), context_length=context_length))


def in_batch_accuracy(text_features: Pooled, image_features: Pooled) -> float:
    """Share of the captions whose own picture is the nearest of the batch."""
    nearest = (text_features @ image_features.T).argmax(dim=1)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean().item()


def measure_recall(
    model: Clip, tokenizer: Any, entities: "Sequence[Entity]", glyphs: "GlyphRenderer"
) -> dict[str, Any]:
    """Recall of text-to-image search among one picture of every entity, in a rendition that was never trained on.

    A query finds its entity when a picture of the same equivalence class is among the first k.
    """
    drawn = [entity for entity in entities if glyphs.draws(entity)]
    device = next(model.parameters()).device
    model.eval()
    pictures = _embed_unseen(model, drawn, glyphs).to(device)
    classes = torch.tensor([entity.class_id for entity in drawn], device=device)
    is_held_out = torch.tensor([entity.held_out for entity in drawn], device=device)
    report: dict[str, Any] = {"pictures": len(drawn)}
    for form, texts in (("name", [e.name for e in drawn]), ("caption", [e.caption for e in drawn])):
        tokens = tokenize(tokenizer, texts, model.context_length).to(device)
        with torch.no_grad():
            scores = model.encode_text(tokens, normalize=True) @ pictures.T
        for split, chosen in (("training", ~is_held_out), ("held_out", is_held_out)):
            if chosen.any():
                report[f"{split}_by_{form}"] = recall_by_class(scores[chosen], classes[chosen], classes)
    return report


def recall_by_class(
    scores: Float[Tensor, "q n"], query_classes: Int[Tensor, " q"], classes: Int[Tensor, " n"]
) -> dict[str, float]:
    """Share of the queries with a picture of their class among the best 1 and the best 10."""
    ranked = classes[scores.argsort(dim=1, descending=True)]
    is_hit = ranked == query_classes[:, None]
    return {f"recall_at_{k}": is_hit[:, :k].any(dim=1).float().mean().item() for k in (1, 10)}


def export_clip(model: Clip, tokenizer: Any, config: ClipTrainConfig, folder: Path) -> None:
    """Save in open_clip's `local-dir:` form, with weights in half precision. An existing folder is replaced whole."""
    from safetensors.torch import save_file

    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    model_part = model_config(config, vocab_size=tokenizer.get_vocab_size())
    weights = {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}
    with new_folder(folder) as partial:
        save_tokenizer(tokenizer, partial)
        write_json(partial / "open_clip_config.json", {"model_cfg": model_part, "preprocess_cfg": preprocessing})
        save_file(weights, partial / "open_clip_model.safetensors", {"format": "pt"})


def _embed_unseen(model: Clip, entities: "Sequence[Entity]", glyphs: "GlyphRenderer") -> Pooled:
    import numpy as np

    from radt.corpora.emoji import render_rendition, rendition

    device = next(model.parameters()).device
    size = model.visual.image_size[0]
    features = []
    for first in range(0, len(entities), 256):
        pictures = np.stack([
            render_rendition(glyphs.glyph(entity), rendition(entity, UNSEEN_RENDITION), size)
            for entity in entities[first : first + 256]
        ])
        with torch.no_grad():
            features.append(model.encode_image(to_pixels(torch.from_numpy(pictures)).to(device), normalize=True))
    return torch.cat(features)


def _run_tokenizer(out: Path, config: ClipTrainConfig, training: "Sequence[Entity]") -> Any:
    """The run's own tokenizer, made on its first day: the vocabulary must not move under trained vectors."""
    from radt.training.emoji_pairs import vocabulary_captions

    path = out / "tokenizer.json"
    if not path.exists():
        captions = vocabulary_captions(training, num_scenes=VOCABULARY_SCENES, seed=config.seed)
        write_bytes(path, train_tokenizer(captions, vocab_size=config.vocab_size).to_str().encode())
    return load_tokenizer(path)
