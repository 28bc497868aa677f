"""Guidance: every step mixes predictions of one network that see the whole condition or a part of it (rows R10, I9).

Guidance turns a denoiser and a condition into a `Denoise`, which is all that a sampler sees. Next on the main path:
`radt/diffusion/samplers.py`.

With c_p the prompt, c_n the neighbours, and weights w_p, w_n >= 1:

    text step:       eps_p = w_p eps(x, c_p, c_n) + (1 - w_p) eps(x, c_n)
    neighbor step:   eps_n = w_n eps(x, c_p, c_n) + (1 - w_n) eps(x, c_p)
    joint step:      w_p eps(x, c_p, c_n) + (w_n - w_p) eps(x, c_n) + (1 - w_n) eps(x)

The first two alternate in interleaved guidance (Re-Imagen, Chen et al. 2022, section 3.3). The third takes both
directions in every step, eps(x) + w_n (eps(x, c_n) - eps(x)) + w_p (eps(x, c_p, c_n) - eps(x, c_n)), as
InstructPix2Pix does with an image and a text (Brooks et al. 2022, equation 3). A negative prompt stands in the place
of c_p wherever c_p is left out.

The code mixes clean images instead. It is the same thing: at fixed x and t, eps = (x - alpha x0) / sigma is affine in
x0, and the weights of each line add up to 1, so the mix of the x0s holds the mix of the eps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from index.errors import ConfigError
from radt.conditioning import Condition, TextCondition, map_tensors
from radt.diffusion.denoiser import Denoise, Denoiser
from radt.diffusion.schedule import per_pixel
from radt.diffusion.thresholding import Threshold, static_threshold
from radt.settings import BranchOrder, GenerateSettings
from radt.shapes import Pixels

Branch = Literal["text", "neighbor", "joint"]
OnCall = Callable[[Sequence[int]], None]  # the network rows that a call spends on each image


class Mix(NamedTuple):
    """The weight of each prediction in one step of one image. They add up to 1; one of weight 0 is not computed.

    A sampler compares the mixes of two steps: where they differ, the steps follow two different fields.
    """

    given: float = 1.0
    without_text: float = 0.0
    without_neighbors: float = 0.0
    without_both: float = 0.0

    def hide_neighbors(self) -> "Mix":
        """The same with c_n null everywhere."""
        text, null = self.given + self.without_neighbors, self.without_text + self.without_both
        return Mix(given=0.0, without_neighbors=text, without_both=null)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the four predictions, in the order of PARTS."""
        return self.given, self.without_text, self.without_neighbors, self.without_both

    @property
    def num_rows(self) -> int:
        """What it costs: a network row for every prediction in it."""
        return sum(weight != 0 for weight in self.weights)


Plan = tuple[Mix, ...]  # one image's mix at every step
PLAIN = Mix()  # no guidance
PARTS = ((False, False), (True, False), (False, True), (True, True))  # without text, without neighbours


def mix(branch: Branch, *, text_guidance: float, neighbor_guidance: float) -> Mix:
    """The mix of a branch, by the formulas above."""
    check_scale("text_guidance", text_guidance)
    check_scale("neighbor_guidance", neighbor_guidance)
    w_p, w_n = torch.tensor([text_guidance, neighbor_guidance], dtype=torch.float32).tolist()  # where 1 - w is exact
    if branch == "text":
        return Mix(given=w_p, without_text=1 - w_p)
    if branch == "neighbor":
        return Mix(given=w_n, without_neighbors=1 - w_n)
    return Mix(given=w_p, without_text=w_n - w_p, without_both=1 - w_n)


def plan_guidance(
    settings: GenerateSettings, times: Sequence[float], *, generator: torch.Generator, has_neighbors: bool = True
) -> Plan:
    """One image's mix at every step of a sampler's `times`; the coin is thrown with the image's own generator.

    A step that begins outside `guidance_interval` is not guided (Kynkaanniemi et al. 2024, equation 5, with times of
    the schedule for noise levels); one outside `neighbor_interval` sees no neighbours (row R11).
    """
    num_steps = len(times) - 1
    branches: Sequence[Branch] = ["joint"] * num_steps
    if settings.guidance == "interleaved":
        branches = plan_branches(num_steps, text_share=settings.text_share, order=settings.order, generator=generator)
    ceilings = [math.inf] * num_steps
    if settings.oscillate_to is not None:
        ceilings = oscillate(branches, low=settings.oscillate_to, after=settings.oscillate_after)
    plan = []
    for t, branch, ceiling in zip(times, branches, ceilings, strict=False):
        now = PLAIN
        if within(t, settings.guidance_interval):
            now = mix(
                branch,
                text_guidance=min(settings.text_guidance, ceiling),
                neighbor_guidance=min(settings.neighbor_guidance, ceiling),
            )
        is_seen = has_neighbors and within(t, settings.neighbor_interval)
        plan.append(now if is_seen else now.hide_neighbors())
    return tuple(plan)


def within(t: float, interval: tuple[float, float]) -> bool:
    """Whether a time lies in the interval, its ends included, to more digits than anyone types."""
    return interval[0] - 1e-9 <= t <= interval[1] + 1e-9


def oscillate(branches: Sequence[Branch], *, low: float, after: int) -> list[float]:
    """The highest weight that each step may have: no bound for `after` steps, then `low` and none in turn (row I9).

    Turns are taken within a branch: with branches that alternate, turns by step would leave one of them always low.
    """
    ceilings = []
    turns: dict[Branch, int] = {}
    for step, branch in enumerate(branches):
        if step < after:
            ceilings.append(math.inf)
            continue
        turns[branch] = turns.get(branch, 0) + 1
        ceilings.append(low if turns[branch] % 2 else math.inf)
    return ceilings


def guided(
    denoiser: Denoiser,
    condition: Condition,
    plans: Sequence[Plan],
    *,
    threshold: Threshold = static_threshold,
    on_call: OnCall = lambda rows: None,
) -> Denoise:
    """The condition as a `Denoise` that follows each image's plan. A step is one network call.

    A prediction that stands in an image's mix is one row of the batch. `on_call` is told how many rows each image has
    in every call. Everything that does not depend on x is made here, once.
    """
    assert len(plans) == condition.batch_size, f"{len(plans)} plans for {condition.batch_size} images"
    rows = _Rows(condition, shares_encoder=denoiser.shares_encoder)
    calls = [rows.call(mixes) for mixes in zip(*plans, strict=True)]

    def denoise(x: Pixels, t: float, step: int) -> Pixels:
        on_call(calls[step].num_rows)
        return threshold(calls[step](denoiser, x, t), step)

    return denoise


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Call:
    """One step's network call. The rows come in rounds: every image's first prediction, then the seconds, and so on."""

    condition: Condition
    images: tuple[Int[Tensor, " _r"], ...]  # of each round; of the first, all
    weights: tuple[Float[Tensor, " _r"], ...]
    num_rows: tuple[int, ...]  # of each image
    seen: Int[Tensor, " _s"]  # the image of every row that the encoder sees
    encoded: Int[Tensor, " _p"] | None  # the encoder's row for every prediction; None: its own

    def __call__(self, denoiser: Denoiser, x: Pixels, t: float) -> Pixels:
        if self.encoded is None:
            predictions = denoiser(x[self.seen], t, self.condition)
        else:
            predictions = denoiser.predict_rows(x[self.seen], t, self.condition, rows=self.encoded)
        rounds = torch.split(predictions, [len(images) for images in self.images])
        x0 = per_pixel(self.weights[0]) * rounds[0]
        for images, weights, more in zip(self.images[1:], self.weights[1:], rounds[1:], strict=True):
            x0[images] += per_pixel(weights) * more
        return x0


class _Rows:
    """Makes the calls of a request; equal steps share one, and steps with the same images keys and values."""

    def __init__(self, condition: Condition, *, shares_encoder: bool) -> None:
        self.condition, self.shares_encoder = condition, shares_encoder
        self._calls: dict[tuple[Mix, ...], _Call] = {}
        self._picked: dict[tuple[int, ...], Condition] = {tuple(range(condition.batch_size)): condition}

    def call(self, mixes: tuple[Mix, ...]) -> _Call:
        """The call of a step at which the images have these mixes."""
        if mixes not in self._calls:
            self._calls[mixes] = self._make(mixes)
        return self._calls[mixes]

    def _make(self, mixes: tuple[Mix, ...]) -> _Call:
        device = self.condition.text.mask.device
        rounds = list(in_rounds(mixes))
        rows = [row for one in rounds for row in one]
        encoded, seen = None, rows
        if self.shares_encoder:
            encoded, seen = first_of_equals(rows)
        condition = self._pick(tuple(row.image for row in seen))
        neighbors = self._pick(tuple(row.image for row in rows)).neighbors
        if all(row.without_neighbors for row in rows):
            neighbors = None  # skips their layers altogether
        if neighbors is not None:
            neighbors = neighbors.drop(torch.tensor([row.without_neighbors for row in rows], device=device))
        without_text = torch.tensor([row.without_text for row in seen], device=device)
        return _Call(
            condition=replace(condition, text=leave_out(condition, without_text), neighbors=neighbors, negative=None),
            images=tuple(torch.tensor([row.image for row in one], device=device) for one in rounds),
            weights=tuple(
                torch.tensor([row.weight for row in one], dtype=torch.float32, device=device) for one in rounds
            ),
            num_rows=tuple(now.num_rows for now in mixes),
            seen=torch.tensor([row.image for row in seen], device=device),
            encoded=None if encoded is None else torch.tensor(encoded, device=device),
        )

    def _pick(self, images: tuple[int, ...]) -> Condition:
        if images not in self._picked:
            places = torch.tensor(images, device=self.condition.text.mask.device)
            self._picked[images] = map_tensors(lambda tensor: tensor[places], self.condition)
        return self._picked[images]


class Row(NamedTuple):
    """One prediction of a call: of which image, what it does not see, and its weight in the image's mix."""

    image: int
    without_text: bool
    without_neighbors: bool
    weight: float


def in_rounds(mixes: Sequence[Mix]) -> Iterator[list[Row]]:
    """Every image's first prediction, then the second of those that have one, and so on."""
    rows = [
        [Row(image, *part, weight) for part, weight in zip(PARTS, now.weights, strict=True) if weight]
        for image, now in enumerate(mixes)
    ]
    for place in range(max(map(len, rows))):
        yield [of_image[place] for of_image in rows if place < len(of_image)]


def first_of_equals(rows: Sequence[Row]) -> tuple[list[int] | None, list[Row]]:
    """The rows that differ before any neighbour is looked at, and for every row which of those is its own.

    The first is None where all differ.
    """
    places: dict[tuple[int, bool], int] = {}
    seen: list[Row] = []
    for row in rows:
        if (row.image, row.without_text) not in places:
            places[row.image, row.without_text] = len(seen)
            seen.append(row)
    if len(seen) == len(rows):
        return None, list(rows)
    return [places[row.image, row.without_text] for row in rows], seen


def leave_out(condition: Condition, where: Bool[Tensor, " b"]) -> TextCondition:
    """The text with the null, or the negative prompt where there is one, in the rows where `where` is True."""
    if condition.negative is None:
        return condition.text.drop(where)

    def choose(text: Tensor, negative: Tensor) -> Tensor:
        return torch.where(where.view(-1, *[1] * (text.ndim - 1)), negative, text)

    return map_tensors(choose, condition.text, condition.negative)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkUse:
    """What one picture cost: network calls, those of them that were guided, and the rows of all."""

    calls: int
    guided: int
    rows: int

    @property
    def sentence(self) -> str:
        """For people."""
        unguided = self.calls - self.guided
        return f"{self.calls} network calls, {unguided} of them without guidance: {self.rows} rows"


def network_use(calls: Sequence[Sequence[int]], image: int) -> NetworkUse:
    """The use of one image of a batch, from what `OnCall` was told."""
    rows = [call[image] for call in calls]
    return NetworkUse(calls=len(rows), guided=sum(count > 1 for count in rows), rows=sum(rows))


def plan_branches(
    num_steps: int, *, text_share: float, order: BranchOrder, generator: torch.Generator
) -> tuple[Branch, ...]:
    """Choose one image's branches; `text_share` is eta, the user's dial from neighbours (0) to prompt (1).

    "coin" is the source's rule: each step draws R ~ U[0, 1] from the image's own generator, and R < eta strengthens
    the text. The other orders draw nothing and take exactly floor(num_steps * eta) text steps: spread evenly, or all
    in front, or all at the end.
    """
    if not 0 <= text_share <= 1:
        raise ConfigError(f"text_share {text_share} must lie between 0 (neighbours only) and 1 (text only)")
    num_text = math.floor(num_steps * text_share)
    if order == "coin":
        draws = torch.rand(num_steps, generator=generator, device=generator.device)
        is_text = (draws < text_share).tolist()
    elif order == "low_discrepancy":
        is_text = [is_text_step(step, text_share) for step in range(num_steps)]
    elif order == "text_first":
        is_text = [step < num_text for step in range(num_steps)]
    elif order == "neighbor_first":
        is_text = [step >= num_steps - num_text for step in range(num_steps)]
    else:
        raise ConfigError(f"order {order!r} is unknown; choose coin, low_discrepancy, text_first or neighbor_first")
    return tuple("text" if text else "neighbor" for text in is_text)


def is_text_step(step: int, text_share: float) -> bool:
    """Whether this step strengthens the text; spreads floor(n * share) text steps evenly over n steps."""
    return math.floor((step + 1) * text_share) > math.floor(step * text_share)


def check_scale(name: str, scale: float) -> None:
    """Weights below 1 would push away from what the user asked for."""
    if not scale >= 1:
        raise ConfigError(f"{name} {scale} must be at least 1 (1 = the plain conditional prediction)")


def check_effect(settings: GenerateSettings) -> None:
    """Refuse what would be ignored. A ConfigError says what to do instead."""
    strengthens_text = max(settings.text_guidance, settings.sr_text_guidance) > 1 and not settings.unconditional
    has_text_steps = settings.guidance == "joint" or settings.text_share > 0
    if settings.negative_prompt is not None and not (strengthens_text and has_text_steps):
        raise ConfigError(
            "negative_prompt has no effect where the prompt is not strengthened: "
            "give a prompt, a text_guidance above 1 and a text_share above 0"
        )
    if settings.gamma > 0 and settings.sampler != "ancestral":
        raise ConfigError(f"gamma is of the ancestral sampler and {settings.sampler!r} was asked for: drop one of them")
