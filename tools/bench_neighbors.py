"""What neighbours cost a network call on this machine: K = 0, 2, 8, keys and values kept (row N5) or made again.

    python tools/bench_neighbors.py [--rounds 15] [--ip-adapter]

With --ip-adapter (`pip install diffusers`) also what extra images cost diffusers' U-Net of the same widths on maps of
the same sizes: its adapter sees 16 tokens an image, ours the image's whole maps. Each is a ratio to itself without.

The cases take turns within a round, so that a machine whose speed drifts slows them alike; the claim is the ratio of
medians to K = 0. Random weights: the cost does not depend on them. The last line is one JSON document.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from radt.conditioning import NeighborBatch, TextCondition
from radt.presets import bottleneck_only, emoji_demo
from radt.unet.unet import UNet, UNetConfig

SHIPPED = emoji_demo().unet
FORMS = {
    "many-level (as shipped)": SHIPPED,
    "bottleneck (as in the source)": bottleneck_only(SHIPPED),
}
COUNTS = (2, 8)
IP_TOKENS = 16  # of an image, as in IP-Adapter Plus
Cases = dict[str, Callable[[], torch.Tensor]]


def random_text(*lead: int) -> TextCondition:
    return TextCondition(
        tokens=torch.randn(*lead, 12, SHIPPED.text_width),
        mask=torch.ones(*lead, 12, dtype=torch.bool),
        pooled=torch.randn(*lead, SHIPPED.pooled_width),
    )


@torch.inference_mode()
def cases(config: UNetConfig) -> Cases:
    """One guided step of one image each: two branches in one call."""
    unet = UNet(config).eval()
    x, t, text = torch.randn(2, 3, config.image_size, config.image_size), torch.full((2,), 0.5), random_text(2)
    made: Cases = {"K = 0": lambda: unet(x, t, text)}
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


def ip_adapter_cases() -> Cases:
    """diffusers' U-Net with an adapter for images in every cross-attention; with K = 0 the same network without it."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    def new() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=SHIPPED.image_size // SHIPPED.fold,
            in_channels=3 * SHIPPED.fold**2,
            out_channels=3 * SHIPPED.fold**2,
            block_out_channels=SHIPPED.channels,
            layers_per_block=SHIPPED.blocks[0],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=SHIPPED.heads,  # which is the number of heads, by an old mistake of its own
            cross_attention_dim=SHIPPED.text_width,
            norm_num_groups=8,
        ).eval()

    plain, adapted = new(), new()
    processors = {}
    for name, processor in adapted.attn_processors.items():
        inner = adapted.get_submodule(name.removesuffix(".processor")).inner_dim
        processors[name] = processor
        if name.endswith("attn2.processor"):
            processors[name] = IPAdapterAttnProcessor2_0(inner, SHIPPED.text_width, num_tokens=(IP_TOKENS,))
    adapted.set_attn_processor(processors)
    adapted.encoder_hid_proj = _Embedded()
    adapted.config.encoder_hid_dim_type = "ip_image_proj"
    side = SHIPPED.image_size // SHIPPED.fold
    x, t, text = torch.randn(2, 3 * SHIPPED.fold**2, side, side), torch.full((2,), 0.5), random_text(2).tokens
    made: Cases = {"K = 0": lambda: plain(x, t, text, return_dict=False)[0]}
    for k in COUNTS:
        given = {"image_embeds": [torch.randn(2, k * IP_TOKENS, SHIPPED.text_width)]}
        made[f"K = {k}"] = lambda given=given: adapted(x, t, text, added_cond_kwargs=given, return_dict=False)[0]
    return made


class _Embedded(nn.Module):
    """The images' tokens as they are: an adapter's user computes them once."""

    def forward(self, image_embeds: list[torch.Tensor]) -> list[torch.Tensor]:
        return image_embeds


@torch.inference_mode()
def measure(made: Cases, rounds: int) -> dict[str, float]:
    """Median seconds of each case."""
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
    parser.add_argument("--ip-adapter", action="store_true")
    asked = parser.parse_args()
    forms = {form: cases(config) for form, config in FORMS.items()}
    if asked.ip_adapter:
        forms["IP-Adapter"] = ip_adapter_cases()
    results = {}
    for form, made in forms.items():
        medians = measure(made, asked.rounds)
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
