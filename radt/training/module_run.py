"""A run of one module and its optimiser, for the small trainings: the CLIP and the recogniser."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from index.atomic import write_bytes
from index.config import to_dict
from index.errors import ConfigError
from radt.training.checkpoint import (
    load_optimizer,
    load_state,
    optimizer_tensors,
    save_state,
    with_prefix,
    without_prefix,
)

FREE = {"num_steps", "log_every", "save_every"}  # what may change when a run resumes


@dataclass(kw_only=True, slots=True)
class ModuleRun:
    """What changes while training, and all that is saved. What a step learns from depends on its number alone."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, path: Path) -> None:
        """Write weights, optimiser state and step, all or nothing."""
        tensors = with_prefix("module", self.module.state_dict())
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
        save_state(path, tensors, {"step": self.step})

    def load(self, path: Path) -> None:
        """Continue from `path` where it exists."""
        if path.exists():
            tensors, facts = load_state(path)
            self.module.load_state_dict(without_prefix("module", tensors))
            load_optimizer(self.optimizer, without_prefix("optimizer", tensors))
            self.step = facts["step"]

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step, of all parameters alike."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def claim_folder(out: Path, config: Any) -> None:
    """Write the configuration into a run folder; in an old one, insist on the same but for `FREE`."""
    out.mkdir(parents=True, exist_ok=True)
    path, ours = out / "config.json", to_dict(config)
    theirs = json.loads(path.read_text()) if path.exists() else ours
    changed = [f"{name} was {theirs.get(name)}" for name in ours if name not in FREE and theirs.get(name) != ours[name]]
    if changed:
        raise ConfigError(f"{out} holds another run ({', '.join(changed)}): resume it with that, or use another folder")
    write_json(path, ours)


def write_json(path: Path, value: Any) -> None:
    """Write a small document, all or nothing."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())
