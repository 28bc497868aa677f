"""The optimiser of a stage and its learning-rate schedule. Every stage has its own (row I12)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from index.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """One of torch's optimisers with linear warm-up, a constant stretch, and a linear cool-down to zero at the end.

    `adafactor` keeps one row and one column of second moments where the others keep two numbers a weight (Shazeer and
    Stern 2018); its `lr` is a share of each matrix's own size, and it has no betas. `adam` has no weight decay.
    """

    name: Literal["adamw", "adam", "adafactor"] = "adamw"
    lr: float = 7e-4
    betas: tuple[float, ...] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    cooldown_share: float = 0.25
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are two numbers of 0 or more and below 1, got {self.betas}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if self.warmup_steps < 0 or not 0 <= self.cooldown_share <= 1:
            raise ConfigError(
                f"warmup_steps must be 0 or more and cooldown_share a share of 1, "
                f"got {self.warmup_steps} and {self.cooldown_share}"
            )


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names: matrices and kernels with weight decay; norms, biases and gains without."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    decay = 0.0 if config.name == "adam" else config.weight_decay  # Adam would take it for part of the gradient
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of a step. The cool-down is a share of the whole, so a longer run has a longer one, which starts later.

    A run that is extended goes back to the full rate, however far it had cooled down.
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cooldown_steps = max(1.0, config.cooldown_share * num_steps)
    return config.lr * warmup * max(0.0, min(1.0, (num_steps - step) / cooldown_steps))
