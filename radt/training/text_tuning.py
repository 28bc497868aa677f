"""Fine-tuning the text encoder after the generators (row I2): `radt train ... --set text_tuning.num_steps=N`.

The trained network stays as it is and its diffusion loss moves the text encoder, at a lower learning rate. The bundle
then has the tuned encoder in `text/`; `clip/`, which retrieves, is not touched, so no knowledge base has to be made
again. Everything random in step s comes from (seed, s): a run that was killed resumes to the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Int
from torch import Tensor, nn

from index.errors import ConfigError
from radt.bundle import CLIP_FOLDER, TEXT_FOLDER, load_unet, read_info, write_bundle
from radt.conditioning import TextCondition, map_tensors
from radt.text_encoder import ClipTextEncoder, TrainableTextEncoder, TransformersTextEncoder, fingerprint
from radt.training.checkpoint import (
    load_optimizer,
    load_state,
    optimizer_tensors,
    save_state,
    with_prefix,
    without_prefix,
)
from radt.training.data import DataConfig, draw_batch
from radt.training.follow import OnStep, follow
from radt.training.loop import Objective, step_generator
from radt.training.metrics import forget_after
from radt.training.optim import OptimConfig, learning_rate, make_optimizer
from radt.training.pack import Pack, TextTable
from radt.training.precompute import Captions
from radt.unet.unet import UNet

STATE_FILE = "text_tuning.safetensors"
METRICS_FILE = "text_tuning.jsonl"

OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTuning:
    """How the text encoder is tuned; with no steps it stays frozen."""

    num_steps: int = 0
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5, weight_decay=0.0, warmup_steps=20))
    seed: int = 0
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ConfigError(f"text_tuning.num_steps must be 0 (frozen) or more, got {self.num_steps}")
        for name in ("save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"text_tuning.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveText(TextTable):
    """A table of captions that are embedded anew each time, by the encoder in training."""

    captions: Sequence[str]
    encoder: TrainableTextEncoder

    def gather(self, rows: Int[Tensor, "*b"]) -> TextCondition:
        """The captions of these rows as the encoder now has them."""
        embedded = self.encoder.embed([self.captions[row] for row in rows.flatten().tolist()])
        return map_tensors(lambda tensor: tensor.unflatten(0, tuple(rows.shape)), embedded)

    @staticmethod
    def of(table: TextTable, captions: Sequence[str], encoder: TrainableTextEncoder) -> "LiveText":
        """The same rows, live."""
        return LiveText(
            tokens=table.tokens,
            scales=table.scales,
            starts=table.starts,
            pooled=table.pooled,
            captions=captions,
            encoder=encoder,
        )


class TextTuner:
    """The text encoder in training against a network that stays as it is."""

    def __init__(
        self,
        encoder: TrainableTextEncoder,
        network: UNet,
        pack: Pack,
        captions: Captions,
        *,
        objective: Objective,
        data: DataConfig,
        tuning: TextTuning,
    ) -> None:
        self.encoder, self.network, self.objective, self.data, self.tuning = encoder, network, objective, data, tuning
        self.weights = {name: each.requires_grad_() for name, each in encoder.trainable().items()}
        self.optimizer = make_optimizer(nn.ParameterList(self.weights.values()), tuning.optim)
        self.pack = replace(
            pack,
            scene_text=LiveText.of(pack.scene_text, captions.scenes, encoder),
            picture_text=LiveText.of(pack.picture_text, captions.pictures, encoder),
        )
        self.step = 0

    def train(self, folder: Path, *, on_step: OnStep = lambda _: None, on_stage: OnStage = lambda _: None) -> None:
        """Train to the last step, resuming from what lies in `folder`. At Ctrl-C the step in hand is saved first.

        What was tuned for another network is started anew.
        """
        self._resume(folder / STATE_FILE, on_stage)
        forget_after(folder / METRICS_FILE, self.step)
        follow(
            self._steps(),
            self.tuning,
            state=folder / STATE_FILE,
            log=folder / METRICS_FILE,
            save=lambda: self._save(folder / STATE_FILE),
            on_step=on_step,
        )

    def loss(self, step: int) -> Tensor:
        """The mean loss of the batch of one step, which depends on the seed and the step alone."""
        generator = step_generator(self.tuning.seed, step, 0, device=torch.device("cpu"))
        return self.objective.loss(self.network, draw_batch(self.pack, self.data, generator), generator)

    def _steps(self) -> Iterator[dict[str, float]]:
        while self.step < self.tuning.num_steps:
            rate = learning_rate(self.step, self.tuning.num_steps, self.tuning.optim)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(self.step)
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(self.weights.values(), self.tuning.optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            yield {"step": self.step, "loss": float(loss.detach()), "grad_norm": float(norm), "lr": rate}

    def _save(self, path: Path) -> None:
        tensors = with_prefix("encoder", {name: each.detach() for name, each in self.weights.items()})
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
        save_state(path, tensors, {"step": self.step, "network": network_digest(self.network)})

    def _resume(self, path: Path, on_stage: OnStage) -> None:
        if not path.exists():
            return
        tensors, facts = load_state(path)
        own = network_digest(self.network)
        if facts.get("network", own) != own:  # an older version did not note it
            on_stage("the network was trained further: tuning starts anew")
            return
        with torch.no_grad():
            for name, value in without_prefix("encoder", tensors).items():
                self.weights[name].copy_(value)
        load_optimizer(self.optimizer, without_prefix("optimizer", tensors))
        self.step = int(facts["step"])


def network_digest(network: UNet) -> str:
    """Names the weights that a text encoder was tuned for."""
    return fingerprint("unet", network.state_dict(), b"", {})


def find_tuned(out: Path, network: UNet) -> str | None:
    """The text encoder in the bundle in `out`, where this very network is what it was, or is being, tuned for."""
    folder, state = out / "bundle" / TEXT_FOLDER, out / STATE_FILE
    if folder.is_dir() and state.exists() and load_state(state)[1].get("network") == network_digest(network):
        return str(folder)
    return None


def tune_bundle(
    out: Path,
    pack: Pack,
    *,
    encoder: ClipTextEncoder | TransformersTextEncoder,
    objective: Objective,
    data: DataConfig,
    tuning: TextTuning,
    on_step: OnStep = lambda _: None,
    on_stage: OnStage = lambda _: None,
) -> None:
    """Tune the text encoder of a finished run in `out`, and write its bundle again with the tuned one in `text/`."""
    bundle = out / "bundle"
    info = read_info(bundle)
    (stage,) = info.stages
    network = load_unet(bundle / stage.name)
    captions = Captions.load(out, pack)
    tuner = TextTuner(encoder, network, pack, captions, objective=objective, data=data, tuning=tuning)
    tuner.train(out, on_step=on_step, on_stage=on_stage)
    with TemporaryDirectory(dir=out) as temporary:
        text = Path(temporary) / "text"
        encoder.save(text)
        write_bundle(
            bundle,
            name=info.name,
            clip=bundle / CLIP_FOLDER,
            unets=[network],
            stages=[stage],
            sampling=info.sampling,
            text_encoder=str(text),
        )
