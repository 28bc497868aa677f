"""Signs of life, read off a network while it trains: does it look at its neighbours, and are they worth anything?

One batch that never changes, with noise that never changes, is denoised with the right neighbour of each example, with
none, and with the neighbour of another example. What the right one takes off the loss is its worth; where attention
goes when a right and a wrong one lie side by side says whether the network tells them apart.

Next on the path: `radt/training/doctor.py`, which judges what is read here.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from radt.conditioning import NeighborBatch, map_tensors
from radt.diffusion.loss import sample_times
from radt.training.data import Batch, DataConfig, draw_batch
from radt.training.loop import Objective, step_generator
from radt.training.metrics import append_metrics, forget_after
from radt.training.pack import Pack
from radt.unet.unet import UNet

PROBE_FILE = "probe.jsonl"
EXAMPLES, LARGEST = 32, 64  # so many up to this side, fewer of larger pictures: about six training steps of time
RANKS = -2, -3  # generators of their own, which no process of training and no sheet uses


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one probe says. Losses are of the same noise; attention is a share, the sink's part is what is left."""

    loss: float  # with the right neighbour
    loss_without: float
    loss_shuffled: float  # with another example's
    attention_right: float  # of a right and a wrong one side by side
    attention_wrong: float
    examples: int

    @property
    def gain(self) -> float:
        """The share of the loss that a right neighbour takes away, beside none."""
        return 1 - self.loss / self.loss_without

    @property
    def gain_over_shuffled(self) -> float:
        """The same beside a wrong one."""
        return 1 - self.loss / self.loss_shuffled

    @property
    def attention_sink(self) -> float:
        """The share that no neighbour gets."""
        return 1 - self.attention_right - self.attention_wrong

    def to_json(self) -> dict[str, Any]:
        """Every number."""
        told = ("gain", "gain_over_shuffled", "attention_sink")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in told}}


@torch.no_grad()
def probe(network: UNet, pack: Pack, *, data: DataConfig, objective: Objective, seed: int) -> Reading | None:
    """Read a network, in float32 and with generators of its own, so that training goes on as if nobody had looked.

    The batch depends on pack, data and seed alone. None where no example of the pack has a neighbour.
    """
    device = next(network.parameters()).device
    batch = probe_batch(pack, data, step_generator(seed, 0, RANKS[0], device=device))
    if len(batch.x0) < 2:
        return None
    right, wrong = batch.neighbors, map_tensors(lambda each: each.roll(1, dims=0), batch.neighbors)
    nobody = dataclasses.replace(right, mask=torch.zeros_like(right.mask))

    def loss(neighbors: NeighborBatch) -> float:
        shown = dataclasses.replace(batch, neighbors=neighbors)
        return float(objective.loss(network, shown, step_generator(seed, 0, RANKS[1], device=device)))

    generator = step_generator(seed, 0, RANKS[1], device=device)
    t = sample_times(generator, len(batch.x0))
    x = objective.schedule.add_noise(batch.x0, torch.randn(batch.x0.shape, generator=generator, device=device), t)
    low_res = objective.draw_low_res(network, batch.x0, generator)
    pair = network.project_neighbors(side_by_side(right, wrong))
    shares = network.attention_mass(x, t, batch.text, pair, low_res=low_res).mean(dim=0).tolist()
    return Reading(
        loss=loss(right),
        loss_without=loss(nobody),
        loss_shuffled=loss(wrong),
        attention_right=shares[0],
        attention_wrong=shares[1],
        examples=len(batch.x0),
    )


def keep_reading(out: Path, step: int, images_seen: int, reading: Reading | None) -> None:
    """Put a reading into a run's `probe.jsonl`, in the place of one of the same step."""
    forget_after(out / PROBE_FILE, step - 1)
    if reading is not None:
        append_metrics(out / PROBE_FILE, {"step": step, "images_seen": images_seen, **reading.to_json()})


def probe_batch(pack: Pack, data: DataConfig, generator: torch.Generator) -> Batch:
    """Examples as training draws them, but each with its one right neighbour and its prompt."""
    height, width = pack.size
    clean = dataclasses.replace(
        data,
        batch_size=max(8, min(EXAMPLES, EXAMPLES * LARGEST**2 // (height * width))),
        num_neighbors=(1,),
        wrong_prob=0.0,
        missing_prob=0.0,
        drop_text_prob=0.0,
        drop_neighbors_prob=0.0,
    )
    batch = draw_batch(pack, clean, generator)
    there = batch.neighbors.mask[:, 0]
    return map_tensors(lambda each: each[there], batch)


def side_by_side(one: NeighborBatch, other: NeighborBatch) -> NeighborBatch:
    """The neighbours of both, in this order. Their captions are padded alike."""
    return map_tensors(lambda *both: torch.cat(both, dim=1), one, other)
