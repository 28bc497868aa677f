"""The training loop of one stage: draw a batch, denoise, step, average; resumable at any moment (row R13).

Everything random in step s comes from a generator seeded by (seed, s), so no random state needs saving and a run that
was killed and started again is bit for bit the run that was not.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, interpolate

from index.errors import ConfigError
from radt.conditioning import LowResolution
from radt.diffusion.denoiser import Prediction
from radt.diffusion.loss import Weighting, diffusion_loss, sample_times, shift_times
from radt.diffusion.schedule import NoiseSchedule
from radt.resizing import resize
from radt.shapes import Pixels
from radt.training.checkpoint import (
    load_optimizer,
    load_state,
    optimizer_tensors,
    save_state,
    with_prefix,
    without_prefix,
)
from radt.training.data import Batch, DataConfig, draw_batch
from radt.training.ema import Ema
from radt.training.follow import OnStep, follow
from radt.training.metrics import forget_after
from radt.training.optim import OptimConfig, learning_rate, make_optimizer
from radt.training.pack import Pack
from radt.unet.unet import UNet

METRICS_FILE, STATE_FILE = "metrics.jsonl", "state.safetensors"
BEND_CELL = 4  # pixels from knot to knot of a bend


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long, how exact, and how often state is kept."""

    num_steps: int = 4000
    seed: int = 0
    precision: Literal["no", "bf16"] = "bf16"  # of the forward pass; weights and averages stay float32
    ema_decay: float = 0.999
    save_every: int = 250
    log_every: int = 20
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}")


@runtime_checkable
class LossFunction(Protocol):
    """What a run minimises: an `Objective`, or what a student is taught (`radt/training/distill_run.py`)."""

    def loss(self, network: UNet, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch; everything random comes from the generator."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the network is trained to answer, and how errors at each time are weighed.

    A super-resolution stage is trained to draw over the true picture, shrunk, enlarged, and noised to a level that is
    uniform up to `augmentation` (row I4).

    Deviates from Imagen: the shrunk picture may also be bent, by up to `warp` of its pixels, as the stage below draws
    outlines; what is straight is then to be found in the neighbours alone.
    """

    schedule: NoiseSchedule
    prediction: Prediction = "v"
    weighting: Weighting = "v"
    augmentation: float = 0.5
    warp: float = 0.0
    time_shift: float = 1.0

    def loss(self, network: UNet, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch at stratified random times."""
        t = shift_times(sample_times(generator, len(batch.x0)), self.time_shift)
        eps = torch.randn(batch.x0.shape, generator=generator, device=generator.device)
        neighbors = network.project_neighbors(batch.neighbors)
        low_res = self.draw_low_res(network, batch.x0, generator)
        output = network(self.schedule.add_noise(batch.x0, eps, t), t, batch.text, neighbors, low_res=low_res)
        return diffusion_loss(
            output,
            x0=batch.x0,
            eps=eps,
            t=t,
            schedule=self.schedule,
            prediction=self.prediction,
            weighting=self.weighting,
        ).mean()

    def draw_low_res(self, network: UNet, x0: Pixels, generator: torch.Generator) -> LowResolution | None:
        """What a super-resolution stage draws over, at stratified random levels; None for a first stage."""
        small = network.config.low_res
        if small is None:
            return None
        level = self.augmentation * sample_times(generator, len(x0))
        eps = torch.randn(x0.shape, generator=generator, device=generator.device)
        below = resize(x0, small)
        if self.warp:
            below = bend(below, self.warp, generator)
        enlarged = resize(below, network.config.size)
        return LowResolution(pixels=self.schedule.add_noise(enlarged, eps, level), level=level)


def bend(pixels: Pixels, most: float, generator: torch.Generator) -> Pixels:
    """Shift every pixel smoothly, and each picture by another strength: `most` pixels at most."""
    b, _, height, width = pixels.shape
    device = generator.device
    knots = (
        2 * torch.rand(b, 2, height // BEND_CELL + 1, width // BEND_CELL + 1, generator=generator, device=device) - 1
    )
    strength = most * torch.rand(b, 1, 1, 1, generator=generator, device=device)
    shift = strength * interpolate(knots, size=(height, width), mode="bicubic", align_corners=True).clamp(-1, 1)
    shift = 2 * shift / torch.tensor([width, height], device=device).view(1, 2, 1, 1)  # grid_sample's frame is 2 wide
    still = affine_grid(torch.eye(2, 3, device=device).expand(b, 2, 3), [b, 1, height, width], align_corners=False)
    bent: Tensor = grid_sample(
        pixels, still + shift.permute(0, 2, 3, 1), mode="bicubic", padding_mode="border", align_corners=False
    )
    return bent.clamp(-1, 1)


class _Step(nn.Module):
    """Loss as a module, so that a wrapper for many processes sees one forward pass and synchronises its gradients."""

    def __init__(self, network: UNet, objective: LossFunction) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.objective.loss(self.network, batch, generator)


class Run:
    """One stage in training: the network, its optimiser, its average, and where they are kept."""

    def __init__(
        self,
        network: UNet,
        pack: Pack,
        out: Path,
        *,
        data: DataConfig,
        optim: OptimConfig,
        loop: LoopConfig,
        objective: LossFunction,
    ) -> None:
        self.accelerator = Accelerator(mixed_precision=loop.precision, cpu=not torch.cuda.is_available())
        device = self.accelerator.device
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.pack = pack.to(device)
        self.out, self.data, self.optim, self.loop = out, data, optim, loop
        self.ema = Ema(self.network, loop.ema_decay)
        optimizer = make_optimizer(self.network, optim)
        step_module: nn.Module = _Step(self.network, objective)
        if loop.compile:
            self.network.compile()
        self.step_module, self.optimizer = self.accelerator.prepare(step_module, optimizer)
        self.step = 0
        if self.state_path.exists():
            self._resume()

    @property
    def state_path(self) -> Path:
        """The file a run resumes from."""
        return self.out / STATE_FILE

    def train(self, *, on_step: OnStep = lambda _: None, on_save: Callable[["Run"], None] = lambda _: None) -> None:
        """Train to the last step. At Ctrl-C the step in hand is finished and saved before the interruption goes on.

        A run that is over calls `on_save` once more, so that one trained elsewhere can leave its model here. A loss
        that is no number any more is a DivergedError, and the last state that was saved stays.
        """
        if self.accelerator.is_main_process:
            forget_after(self.out / METRICS_FILE, self.step)
        if self.step >= self.loop.num_steps:
            on_save(self)
        follow(
            self._steps(),
            self.loop,
            state=self.state_path,
            log=self.out / METRICS_FILE if self.accelerator.is_main_process else None,
            save=self._save,
            on_step=on_step,
            on_save=lambda: on_save(self),
        )

    def _steps(self) -> Iterator[dict[str, float]]:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        started, first = time.perf_counter(), self.step
        while self.step < self.loop.num_steps:
            generator = step_generator(self.loop.seed, self.step, rank, device=self.accelerator.device)
            rate = learning_rate(self.step, self.loop.num_steps, self.optim)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = draw_batch(self.pack, self.data, generator)
            with self.accelerator.autocast():
                loss = self.step_module(batch, generator)
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.network, self.step)
            self.step += 1
            elapsed = time.perf_counter() - started
            yield {
                "step": self.step,
                "images_seen": self.step * self.data.batch_size * processes,
                "loss": float(loss.detach()),
                "grad_norm": float(norm),
                "lr": rate,
                "images_per_second": (self.step - first) * self.data.batch_size * processes / elapsed,
            }

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = with_prefix("network", self.network.state_dict())
        tensors |= with_prefix("ema", self.ema.state())
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
        save_state(self.state_path, tensors, {"step": self.step})

    def _resume(self) -> None:
        tensors, facts = load_state(self.state_path)
        self.network.load_state_dict(without_prefix("network", tensors))
        self.ema.load(without_prefix("ema", tensors))
        load_optimizer(self.optimizer, without_prefix("optimizer", tensors))
        self.step = int(facts["step"])


def step_generator(seed: int, step: int, rank: int, *, device: torch.device) -> torch.Generator:
    """The generator of everything random in one step of one process."""
    digest = blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
