"""Exponential moving average of the weights: what is evaluated and shipped."""

import torch
from torch import Tensor, nn


class Ema:
    """Averages in float32. Early on the decay is (1 + step) / (10 + step), so that the start is forgotten."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().clone().float() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards the network's present weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = network.state_dict()
        torch._foreach_lerp_([self.weights[name] for name in state], [t.float() for t in state.values()], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return self.weights

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from saved averages."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])
