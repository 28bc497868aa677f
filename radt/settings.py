"""How a picture is drawn: GenerateSettings, the same words in Python, at the command line, in a bundle and in a PNG."""

import math
from dataclasses import dataclass
from typing import Literal

from index.errors import ConfigError
from radt.postprocess import parse_post

By = Literal["clip", "bm25", "tfidf", "hybrid"]
Fusion = Literal["rrf", "sum", "product"]
Decompose = Literal["off", "phrases", "terms"]
BranchOrder = Literal["low_discrepancy", "coin", "text_first", "neighbor_first"]
ThresholdRule = Literal["static", "dynamic"]
GuidanceRule = Literal["interleaved", "joint"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSettings:
    """Everything but prompt, seed and the user's own references. Guidance weights of 1 mean no guidance (row R10)."""

    k: int = 2  # neighbours; 0 draws from the text alone
    steps: int = 20
    sampler: str = "dpmpp_2m"
    text_guidance: float = 2.0  # w_p
    neighbor_guidance: float = 2.0  # w_n
    text_share: float = 0.5  # eta: the share of steps that strengthen the text rather than the neighbours
    order: BranchOrder = "low_discrepancy"  # which steps those are; "coin" is the source's rule
    guidance: GuidanceRule = "interleaved"  # joint: text and neighbours in every step (radt/diffusion/guidance.py)
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times of the noise schedule between which guidance acts
    neighbor_interval: tuple[float, float] = (0.0, 1.0)  # the same, between which neighbours are seen at all (row R11)
    oscillate_to: float | None = None  # the weight of every other step; None = all alike
    oscillate_after: int = 0  # steps of full weight before that
    negative_prompt: str | None = None  # what guidance leads away from, in the place of the null text
    threshold: ThresholdRule = "static"
    percentile: float = 0.995  # of |x0|: the range that dynamic thresholding shrinks to [-1, 1]
    gamma: float = 0.0  # of the ancestral sampler: its noise from the posterior's, 0, to the forward step's, 1
    by: By = "hybrid"
    fusion: Fusion = "rrf"
    decompose: Decompose = "off"  # neighbours of every thing that the prompt names: `index.search.decompose`
    diversity: float = 0.0  # of the neighbours: 0 is off, up to 1
    dataset: str | None = None
    where: str | None = None
    min_score: float | None = None
    exclude: tuple[str, ...] = ()  # ids of pairs that must not be used
    stages: int | None = None  # of the cascade, from the smallest; None = all
    sr_steps: int = 10  # of every stage above the first, as are the other sr_ settings
    sr_text_guidance: float = 1.0
    sr_neighbor_guidance: float = 1.0
    augmentation_level: float = 0.1  # time of the noise over the picture below: 0 trusts it, 1 ignores it
    unconditional: bool = False  # the null text, and nothing looked up
    strength: float = 0.8  # with a picture to start from: the time of the noise put over it (radt/image_to_image.py)
    post: str | None = None  # what is done to the drawn picture, as NAME=AMOUNT,... (radt/postprocess.py)
    fast: bool = False  # draw with the distilled twins of the stages that have one (radt/fast.py)
    encode_apart: bool = False  # each neighbour in a network call of its own, as a neighbour store needs it
    batch_size: int = 1  # images a network call; 1 keeps every image bitwise the same alone or among others

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"k is the number of neighbours, 0 or more, got {self.k}")
        for name in ("steps", "sr_steps", "stages", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_guidance", "neighbor_guidance", "sr_text_guidance", "sr_neighbor_guidance"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 1):
                raise ConfigError(f"{name} must be 1 (no guidance) or more, got {weight}")
        for name in ("text_share", "diversity", "augmentation_level", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength must lie above 0, the picture as it is, and at most 1, got {self.strength}")
        if self.post is not None:
            parse_post(self.post)
        check_guidance(self)


def check_guidance(settings: GenerateSettings) -> None:
    """Raise a ConfigError for guidance settings that cannot be."""
    for name in ("guidance_interval", "neighbor_interval"):
        interval = getattr(settings, name)
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ConfigError(f"{name} is two times, 0 <= first < second <= 1, got {interval}")
    low, after = settings.oscillate_to, settings.oscillate_after
    if low is not None and not (math.isfinite(low) and low >= 1):
        raise ConfigError(f"oscillate_to must be 1 (no guidance) or more, got {low}")
    if after < 0:
        raise ConfigError(f"oscillate_after is a number of steps, 0 or more, got {after}")
    if not 0 < settings.percentile <= 1:
        raise ConfigError(f"percentile {settings.percentile} must be above 0 and at most 1, as in 0.995")
