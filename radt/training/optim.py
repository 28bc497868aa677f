"""The optimiser and its learning-rate schedule."""

from dataclasses import dataclass

import torch
from torch import nn

from index.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up, a constant stretch, and a linear cool-down to zero at the end."""

    lr: float = 7e-4
    betas: tuple[float, ...] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    cooldown_share: float = 0.25
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError(f"betas are two numbers, got {self.betas}")
        if self.warmup_steps < 0 or not 0 <= self.cooldown_share <= 1:
            raise ConfigError(
                f"warmup_steps must be 0 or more and cooldown_share a share of 1, "
                f"got {self.warmup_steps} and {self.cooldown_share}"
            )


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over matrices and kernels with weight decay, over vectors (norms, biases, gains) without."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of a step. The cool-down is placed from the end, so a longer run only lengthens the constant stretch."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cooldown_steps = max(1.0, config.cooldown_share * num_steps)
    return config.lr * warmup * max(0.0, min(1.0, (num_steps - step) / cooldown_steps))
