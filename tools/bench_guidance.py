"""What every sampler and kind of guidance costs a picture, and how far it leads from the default; markdown.

    radt corpus emoji emoji && radt index build emoji --kb kb
    python tools/bench_guidance.py --kb kb -n 4

Rows are counted as they run (`radt.diffusion.guidance.NetworkUse`); times are medians of rounds in which every way
draws the same prompts and seeds in turn. The distance is the root mean square between the 8-bit pictures, as a share of
their range.
"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from radt.corpora.emoji import load_entities
from radt.pipeline import GeneratedImage, TextToImage

WAYS: dict[str, dict[str, Any]] = {
    "as the model has it": {},
    "--sampler ddim": {"sampler": "ddim"},
    "--sampler heun": {"sampler": "heun"},
    "--sampler heun --steps 10": {"sampler": "heun", "steps": 10},
    "--sampler ancestral": {"sampler": "ancestral"},
    "--sampler ancestral --gamma 1": {"sampler": "ancestral", "gamma": 1.0},
    "--sampler stochastic": {"sampler": "stochastic"},
    "--guidance joint": {"guidance": "joint"},
    "--guidance joint --neighbor-guidance 2": {"guidance": "joint", "neighbor_guidance": 2.0},
    "--guidance-interval 0.2 0.8": {"guidance_interval": (0.2, 0.8)},
    "--guidance joint --guidance-interval 0.2 0.8": {"guidance": "joint", "guidance_interval": (0.2, 0.8)},
    "--oscillate-to 1 --oscillate-after 4": {"oscillate_to": 1.0, "oscillate_after": 4},
    "--neighbor-interval 0.5 1": {"neighbor_interval": (0.5, 1.0)},
    "--negative-prompt blue": {"negative_prompt": "blue"},
    "--threshold dynamic": {"threshold": "dynamic"},
    "--text-guidance 1 --neighbor-guidance 1": {"text_guidance": 1.0, "neighbor_guidance": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", required=True, help="the emoji corpus, built with the shipped model")
    parser.add_argument("--model", help="default: the model inside the package")
    parser.add_argument("-n", type=int, default=4, help="prompts, of entities never trained on")
    given = parser.parse_args()
    pipeline = TextToImage.load(given.model, kb=given.kb, device="cpu")
    held_out = [entity.name for entity in load_entities() if entity.held_out]
    prompts = [f"{name} on a red background" for name in held_out[:: max(1, len(held_out) // given.n)][: given.n]]
    pictures: dict[str, list[GeneratedImage]] = {way: [] for way in WAYS}
    for prompt in prompts:
        for way, settings in WAYS.items():
            pictures[way] += pipeline(prompt, seed=0, **settings)
    print(f"{len(prompts)} held-out prompts, seed 0\n")
    print("| settings | network calls | without guidance | rows a picture | ms a picture | distance |")
    print("|---|---:|---:|---:|---:|---:|")
    for way in WAYS:
        print(line(way, pictures))


def line(way: str, pictures: Mapping[str, list[GeneratedImage]]) -> str:
    """A row of the table."""
    mine, first = pictures[way], next(iter(pictures.values()))
    use = mine[0].network
    assert use is not None, "a picture that was drawn knows what it cost"
    milliseconds = statistics.median(picture.timings_ms["sample"] for picture in mine)
    distances = [distance(a, b) for a, b in zip(mine, first, strict=True)]
    return (
        f"| {way} | {use.calls} | {use.calls - use.guided} | {use.rows} | {milliseconds:.0f} | "
        f"{statistics.mean(distances):.3f} |"
    )


def distance(one: GeneratedImage, other: GeneratedImage) -> float:
    """Root mean square of the difference, as a share of the range."""
    a, b = (np.asarray(picture.image, dtype=np.float64) / 255 for picture in (one, other))
    return float(np.sqrt(np.mean((a - b) ** 2)))


if __name__ == "__main__":
    main()
