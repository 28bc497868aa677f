"""What neighbours cost a network call on this machine: K = 0, 2, 8, keys and values kept (row N5) or made again.

    python tools/bench_neighbors.py [--rounds 15]

The cases take turns within a round, so that a machine whose speed drifts slows them alike; the claim is the ratio of
medians to K = 0. Random weights: the cost does not depend on them. The last line is one JSON document.
"""

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from statistics import median

import torch

from radt.conditioning import NeighborBatch, TextCondition
from radt.presets import emoji_demo
from radt.unet.unet import UNet, UNetConfig

SHIPPED = emoji_demo().unet
FORMS = {
    "many-level (as shipped)": SHIPPED,
    "bottleneck (as in the source)": dataclasses.replace(
        SHIPPED, encoder_neighbor_levels=(2,), decoder_neighbor_levels=()
    ),
}
COUNTS = (2, 8)


def random_text(*lead: int) -> TextCondition:
    return TextCondition(
        tokens=torch.randn(*lead, 12, SHIPPED.text_width),
        mask=torch.ones(*lead, 12, dtype=torch.bool),
        pooled=torch.randn(*lead, SHIPPED.pooled_width),
    )


def cases(config: UNetConfig) -> dict[str, Callable[[], torch.Tensor]]:
    """One guided step of one image each: two branches in one call."""
    unet = UNet(config).eval()
    x, t, text = torch.randn(2, 3, config.image_size, config.image_size), torch.full((2,), 0.5), random_text(2)
    made: dict[str, Callable[[], torch.Tensor]] = {"K = 0": lambda: unet(x, t, text)}
    for k in COUNTS:
        batch = NeighborBatch(
            pixels=torch.randn(2, k, 3, config.image_size, config.image_size),
            text=random_text(2, k),
            mask=torch.ones(2, k, dtype=torch.bool),
        )
        kept = unet.project_neighbors(batch)
        made[f"K = {k}, kept"] = lambda kept=kept: unet(x, t, text, kept)
        made[f"K = {k}, made again"] = lambda batch=batch: unet(x, t, text, unet.project_neighbors(batch))
    return made


@torch.inference_mode()
def measure(config: UNetConfig, rounds: int) -> dict[str, float]:
    """Median seconds of each case."""
    made = cases(config)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds + 2):
        for name, run in made.items():
            start = time.perf_counter()
            for _ in range(5):
                run()
            seconds[name].append((time.perf_counter() - start) / 5)
    return {name: median(values[2:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    results = {}
    for form, config in FORMS.items():
        medians = measure(config, rounds)
        results[form] = {name: round(value / medians["K = 0"], 3) for name, value in medians.items()}
        print(f"{form}: K = 0 takes {1000 * medians['K = 0']:.1f} ms")
        for name, ratio in results[form].items():
            print(f"  {name:<20} {ratio:.2f} x")
    print(
        json.dumps({
            "ratios": results,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        })
    )


if __name__ == "__main__":
    main()
