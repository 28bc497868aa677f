"""From a network's raw prediction to the clean image: eps, x0 or v, and the one boundary of number formats.

Inside the boundary the network runs in `dtype` (autocast); outside everything is float32, because samplers take
differences of nearly equal images. Next on the main path: `radt/diffusion/guidance.py`.
"""

from typing import Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from radt.conditioning import Condition, LowResolution, NeighborKV, TextCondition
from radt.diffusion.schedule import NoiseSchedule, per_pixel
from radt.shapes import PerExample, Pixels

Prediction = Literal["eps", "x0", "v"]


@runtime_checkable
class Denoise(Protocol):
    """The clean image expected behind x_t. One object closes over network, conditioning and guidance.

    `step` counts network steps from 0: guidance may do different things at different steps, and a sampler that
    looks twice in a step passes the same number twice. `x` and the result are float32.
    """

    def __call__(self, x: Pixels, t: float, step: int) -> Pixels:
        """x0 given x_t."""
        ...


@runtime_checkable
class Network(Protocol):
    """What `radt.unet.unet.UNet` is to this package: x_t, time and conditions in, a raw prediction out."""

    def __call__(
        self,
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        neighbors: NeighborKV | None = None,
        *,
        low_res: LowResolution | None = None,
    ) -> Pixels:
        """The raw prediction: eps, x0 or v, as trained."""
        ...


class SharedEncoder(Protocol):
    """A network that looks at no neighbour before its encoder is done."""

    def predict_rows(
        self,
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        neighbors: NeighborKV | None,
        *,
        rows: Int[Tensor, " r"],
        low_res: LowResolution | None = None,
    ) -> Float[Tensor, "r c h w"]:
        """Raw predictions that differ in their neighbours alone where `rows` repeats: see `Denoiser.predict_rows`."""
        ...


class Denoiser:
    """A network as a function (x_t, t, condition) -> x0. It guides nothing and remembers nothing."""

    def __init__(
        self,
        network: Network,
        *,
        schedule: NoiseSchedule,
        prediction: Prediction,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network, self.schedule, self.prediction, self.dtype = network, schedule, prediction, dtype

    def __call__(self, x: Pixels, t: float | Tensor, condition: Condition) -> Pixels:
        """The clean image, float32. `t` is one time for all or a tensor of one time an example."""
        x = x.float()
        times = per_example(t, x)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.network(x, times, condition.text, condition.neighbors, low_res=condition.low_res)
        return x0_from(output.float(), x, times, schedule=self.schedule, prediction=self.prediction)

    @property
    def shares_encoder(self) -> bool:
        """Whether the network can answer `predict_rows`, and so encode once what differs in its neighbours alone."""
        return getattr(self.network, "shares_encoder", False)

    def predict_rows(
        self, x: Pixels, t: float, condition: Condition, *, rows: Int[Tensor, " r"]
    ) -> Float[Tensor, "r c h w"]:
        """As a call, with several clean images for one row of x: `rows` says for every image which row is its own.

        Text and picture below have as many rows as x, and the neighbours as many as there are images.
        """
        x = x.float()
        times = per_example(t, x)
        predict = cast(SharedEncoder, self.network).predict_rows
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = predict(x, times, condition.text, condition.neighbors, rows=rows, low_res=condition.low_res)
        return x0_from(output.float(), x[rows], times[rows], schedule=self.schedule, prediction=self.prediction)


def per_example(t: float | Tensor, x: Pixels) -> PerExample:
    """One time for every row of x. A number is filled in on the device: copying it there would wait for the queue."""
    if not isinstance(t, Tensor):
        t = torch.full((), t, dtype=torch.float32, device=x.device)
    return t.to(device=x.device, dtype=torch.float32).expand(len(x))


def x0_from(output: Pixels, x: Pixels, t: PerExample, *, schedule: NoiseSchedule, prediction: Prediction) -> Pixels:
    """The clean image that a prediction means (Salimans and Ho 2022, section 4)."""
    alpha, sigma = per_pixel(schedule.alpha(t)), per_pixel(schedule.sigma(t))
    if prediction == "x0":
        return output
    if prediction == "eps":
        return (x - sigma * output) / alpha
    return alpha * x - sigma * output


def eps_from_x0(x0: Pixels, x: Pixels, t: PerExample, *, schedule: NoiseSchedule) -> Pixels:
    """The noise that x holds if its clean image is x0."""
    return (x - per_pixel(schedule.alpha(t)) * x0) / per_pixel(schedule.sigma(t))


def target(x0: Pixels, eps: Pixels, t: PerExample, *, schedule: NoiseSchedule, prediction: Prediction) -> Pixels:
    """What a network of this kind should answer: eps, x0, or v = alpha eps - sigma x0."""
    if prediction == "x0":
        return x0
    if prediction == "eps":
        return eps
    return per_pixel(schedule.alpha(t)) * eps - per_pixel(schedule.sigma(t)) * x0
