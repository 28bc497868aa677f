"""How fast a network could be at best: the operations it needs, and the rate at which its device does them."""

import time
from collections.abc import Callable
from typing import Any

PROBES = 8  # the best of them counts, the first of which warms up
PROBE_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices; large enough that a device does nothing else


def count_operations(network: Callable[[Any], Any], inputs: Any) -> int:
    """Multiplications and additions of the matrix products, convolutions and attention in one call of `network`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused attention layer is not seen by its own counter
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops()


def matrix_rate(device: Any, dtype: Any) -> float:
    """Operations a second of `device` in a large plain matrix product: what it reaches, not what its maker says."""
    import torch

    side = PROBE_SIDE[device.type]
    matrix = torch.randn(side, side, device=device).to(dtype)
    synchronize = torch.get_device_module(device).synchronize
    best = float("inf")
    with torch.inference_mode():
        for _ in range(PROBES):
            synchronize()
            started = time.perf_counter()
            matrix @ matrix
            synchronize()
            best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
