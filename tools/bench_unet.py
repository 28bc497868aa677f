"""Our U-Net beside diffusers' and imagen-pytorch's, at equal multiply-adds and at equal parameters.

    pip install diffusers imagen-pytorch
    python tools/bench_unet.py [--width 64] [--image-size 64] [--batch 1] [--compile] [--rounds 20]

All three are Imagen's base network in small: widths times 1, 2, 3, 4, three residual blocks a level, attention to
itself and the text below the first level. A rival's width is the multiple of 8 that comes nearest to our multiply-adds,
and to our parameters. The plain order is our own network with the same weights, halving after a block and doubling
before it. A step is forward, backward and AdamW. Cases take turns within a round; the claim is the ratio of medians to
its time, below 1 where ours is faster. The last line is one JSON document.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn

try:
    from plain_order import PlainOrder  # beside this file
except ModuleNotFoundError:  # pytest imports by path
    from tools.plain_order import PlainOrder

from index.matrix_rate import count_operations, matrix_rate
from radt.conditioning import TextCondition
from radt.unet.unet import UNet, UNetConfig

MULTIPLES, BLOCKS, HEADS = (1, 2, 3, 4), 3, 4
TEXT_WIDTH, TOKENS = 128, 32
Mode = Literal["forward", "step"]
Facts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Case:
    """A network and how it is called; `call` takes the network because compiling puts another in its place."""

    name: str
    network: nn.Module
    call: Callable[[nn.Module], Tensor]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def operations(self) -> int:
        return count_operations(lambda _: self.call(self.network), None)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    t: Tensor
    text: TextCondition

    @classmethod
    def random(cls, batch: int, size: int, device: str) -> "Inputs":
        return cls(
            x=torch.randn(batch, 3, size, size, device=device),
            t=torch.rand(batch, device=device),
            text=TextCondition(
                tokens=torch.randn(batch, TOKENS, TEXT_WIDTH, device=device),
                mask=torch.ones(batch, TOKENS, dtype=torch.bool, device=device),
                pooled=torch.randn(batch, TEXT_WIDTH, device=device),
            ),
        )


def our_config(width: int, size: int) -> UNetConfig:
    return UNetConfig(
        image_size=size,
        text_width=TEXT_WIDTH,
        pooled_width=TEXT_WIDTH,
        channels=tuple(width * multiple for multiple in MULTIPLES),
        blocks=(BLOCKS,) * 4,
        fold=1,
        embedding_width=4 * width,
        attention_levels=(1, 2, 3),
        heads=HEADS,
        encoder_neighbor_levels=(),
        decoder_neighbor_levels=(),
    )


def ours(width: int, given: Inputs) -> Case:
    network = UNet(our_config(width, given.x.shape[-1]))
    return Case("radt", network, lambda network: network(given.x, given.t, given.text))


def plain_order(width: int, given: Inputs) -> Case:
    network = PlainOrder(our_config(width, given.x.shape[-1]))
    return Case("plain order", network, lambda network: network(given.x, given.t, given.text))


def diffusers(width: int, given: Inputs) -> Case:
    """The layout of DeepFloyd IF, which is Imagen's base network in diffusers."""
    from diffusers import UNet2DConditionModel

    channels = tuple(width * multiple for multiple in MULTIPLES)
    network = UNet2DConditionModel(
        sample_size=given.x.shape[-1],
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=BLOCKS,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        attention_head_dim=2 * width // HEADS,  # one for all levels, or it builds blocks that do not fit
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        act_fn="silu",
    )

    def call(network: nn.Module) -> Tensor:
        return network(given.x, given.t, encoder_hidden_states=given.text.tokens, return_dict=False)[0]

    return Case("diffusers", network, call)


def imagen_pytorch(width: int, given: Inputs) -> Case:
    """As its own BaseUnet64 is. Importing it asks the hub for a T5's width, which is answered here."""
    from transformers import T5Config

    with patch.object(T5Config, "from_pretrained", lambda name: T5Config()):
        from imagen_pytorch import Unet

    attends = (False, True, True, True)
    network = Unet(
        dim=width,
        dim_mults=MULTIPLES,
        num_resnet_blocks=BLOCKS,
        layer_attns=attends,
        layer_cross_attns=attends,
        attn_heads=HEADS,
        attn_dim_head=32,
        ff_mult=2.0,
        memory_efficient=False,
        text_embed_dim=TEXT_WIDTH,
        max_text_len=TOKENS,
    )

    def call(network: nn.Module) -> Tensor:
        return network(given.x, given.t, text_embeds=given.text.tokens, text_mask=given.text.mask)

    return Case("imagen-pytorch", network, call)


Make = Callable[[int, Inputs], Case]


def nearest(make: Make, wanted: Case, given: Inputs, fact: str, *, limit: int) -> int:
    """The rival's width at which its `fact` (operations or parameters) comes nearest to ours, by bisection."""

    def value(steps: int) -> int:
        return getattr(make(8 * steps, given), fact)

    goal, low, high = getattr(wanted, fact), 1, limit // 8
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) < goal else (low, middle)
    return 8 * min((low, high), key=lambda steps: abs(value(steps) - goal))


def runner(case: Case, mode: Mode, *, compiled: bool, autocast: bool) -> Callable[[], None]:
    """One forward pass, or one training step."""
    device = next(case.network.parameters()).device.type
    network: Any = torch.compile(case.network, dynamic=False) if compiled else case.network
    optimizer = torch.optim.AdamW(case.network.parameters(), lr=1e-4) if mode == "step" else None

    def run() -> None:
        with torch.set_grad_enabled(mode == "step"), torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = case.call(network).float().square().mean()
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def measure(runs: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each; two rounds warm up, and no more are begun after `seconds`."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for number in range(rounds + 2):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - before)
        if number >= 4 and time.perf_counter() - started > seconds:
            break
    return {name: median(values[2:]) for name, values in taken.items()}


def make_cases(width: int, batch: int, size: int, device: str) -> tuple[list[Case], Facts]:
    """The networks on the device, and what each has and does, counted on the meta device."""
    with torch.device("meta"):
        on_paper = Inputs.random(batch, size, "meta")
        base = ours(width, on_paper)
        wanted: list[tuple[str, Make, int]] = [("radt", ours, width), ("radt, plain order", plain_order, width)]
        for make in (diffusers, imagen_pytorch):
            for fact in ("operations", "parameters"):
                best = nearest(make, base, on_paper, fact, limit=4 * width)
                wanted.append((f"{make.__name__}, equal {fact}", make, best))
        facts = {
            name: {"width": best, "parameters": case.parameters, "operations": case.operations}
            for name, make, best in wanted
            for case in [make(best, on_paper)]
        }
    given = Inputs.random(batch, size, device)
    with torch.device(device):
        cases = [replace(make(best, given), name=name) for name, make, best in wanted]
    if device == "cuda":
        for case in cases:
            case.network.to(memory_format=torch.channels_last)
    return cases, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of our first level")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300, help="no round is begun later, in any of the tables")
    parser.add_argument("--compile", action="store_true", help="measure compiled networks too; minutes to compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    on_gpu = asked.device == "cuda"
    torch.manual_seed(0)
    cases, facts = make_cases(asked.width, asked.batch, asked.image_size, asked.device)
    rate = matrix_rate(torch.device(asked.device), torch.bfloat16 if on_gpu else torch.float32)
    tables = {}
    for compiled in (False, True) if asked.compile else (False,):
        for mode in get_args(Mode):
            runs = {case.name: runner(case, mode, compiled=compiled, autocast=on_gpu) for case in cases}
            title = f"{mode}, {'compiled' if compiled else 'eager'}"
            tables[title] = measure(runs, asked.rounds, asked.seconds)
            print_table(title, tables[title], facts, rate)
    print(
        json.dumps({
            "medians": tables,
            "networks": facts,
            "matrix_rate": rate,
            "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
            **vars(asked),
        })
    )


def print_table(title: str, medians: dict[str, float], facts: Facts, rate: float) -> None:
    columns = ("network", "parameters", "multiply-adds", "ms", "ours / it", "share of matrix rate")
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    own = medians["radt"]
    passes = 3 if title.startswith("step") else 1  # a backward pass is two forward ones
    for name, seconds in medians.items():
        operations = facts[name]["operations"]
        print(
            f"| {name} | {facts[name]['parameters'] / 1e6:.1f} M | {operations / 2e9:.2f} G | {1000 * seconds:.1f} | "
            f"{own / seconds:.2f} | {passes * operations / seconds / rate:.2f} |"
        )


if __name__ == "__main__":
    main()
