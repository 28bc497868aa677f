"""The cascade: a stage that draws the picture small, and stages that draw it larger (rows I3 to I5, R15).

Every stage is a U-Net of its own that sees the prompt and, at its own resolution, the neighbours: so fine detail too
comes from the pictures that were retrieved. Deviates from Re-Imagen, whose super-resolution stages see none. Next on
the main path: `radt/diffusion/guidance.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b

import torch

from index.errors import ConfigError
from radt.bundle import Bundle, FastTwin, StageInfo
from radt.conditioning import Condition, LowResolution, NeighborBatch, TextCondition, to_device
from radt.diffusion.denoiser import Denoise, Denoiser
from radt.diffusion.distill import one_row, same_guidance, told
from radt.diffusion.guidance import OnCall, guided, plan_guidance
from radt.diffusion.samplers import SAMPLERS, Generators, Sampler, draw_noise, sample_ancestral
from radt.diffusion.schedule import NoiseSchedule
from radt.diffusion.thresholding import Threshold, dynamic_threshold, static_threshold
from radt.image_to_image import InitImage, Start, starting_point
from radt.resizing import Size, resize
from radt.settings import GenerateSettings
from radt.shapes import PerExample, Pixels
from radt.unet.unet import UNet


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stage:
    """One network of the cascade, and what it was trained to predict under which noise."""

    unet: UNet
    info: StageInfo
    fast: FastTwin | None = None  # what it is the twin of a stage by; None: it is the stage itself
    twin: "Stage | None" = None

    @property
    def size(self) -> Size:
        """Height and width of its pictures."""
        return self.unet.config.size

    @property
    def denoiser(self) -> Denoiser:
        """The network as x_t to x0."""
        return Denoiser(self.unet, schedule=self.info.schedule, prediction=self.info.prediction)

    def condition(self, text: TextCondition, neighbors: NeighborBatch | None) -> Condition:
        """What it is asked with, but for the picture below; keys and values are computed here, once (row N5)."""
        return Condition(text=text, neighbors=None if neighbors is None else self.unet.project_neighbors(neighbors))

    def settings(self, settings: GenerateSettings, number: int) -> GenerateSettings:
        """The settings as this stage reads them: a twin of few steps takes those, by DDIM."""
        asked = of_stage(settings, number)
        if self.fast is None or self.fast.steps is None:
            return asked
        return replace(asked, steps=self.fast.steps, sampler="ddim")

    def one_row(self, condition: Condition, settings: GenerateSettings, *, on_call: OnCall) -> Denoise:
        """How a twin is asked: told its guidance, so that a step has no branches (`radt/diffusion/distill.py`)."""
        guidance = same_guidance(
            condition.batch_size,
            text_guidance=settings.text_guidance,
            neighbor_guidance=settings.neighbor_guidance,
            text_share=settings.text_share,
            device=condition.text.tokens.device,
        )
        denoiser = Denoiser(told(self.unet, guidance), schedule=self.info.schedule, prediction=self.info.prediction)
        return one_row(denoiser, condition, threshold=find_threshold(settings), on_call=on_call)


class Cascade:
    """The stages, smallest picture first. It remembers nothing of a request."""

    def __init__(self, stages: Sequence[Stage], *, device: str = "cpu") -> None:
        self.stages, self.device = tuple(stages), device
        for below, stage in zip(self.stages, self.stages[1:], strict=False):
            if stage.unet.config.low_res is None:
                raise ConfigError(f"stage {stage.info.name!r} draws over no picture, so it can only come first")
            if stage.unet.config.low_res != below.size:
                raise ConfigError(
                    f"stage {stage.info.name!r} draws over pictures of height and width {stage.unet.config.low_res}, "
                    f"and those of {below.info.name!r} are {below.size}"
                )

    def of(self, settings: GenerateSettings) -> tuple[Stage, ...]:
        """The stages that a request runs. A ConfigError when it asks for more than there are."""
        if settings.stages is not None and settings.stages > len(self.stages):
            raise ConfigError(f"stages {settings.stages} were asked for and this model has {len(self.stages)}")
        stages = self.stages[: settings.stages]
        if not settings.fast:
            return stages
        if all(stage.twin is None for stage in stages):
            raise ConfigError("this model has no fast twin: leave out --fast, or `radt train emoji-demo-fast`")
        return tuple(stage.twin or stage for stage in stages)

    def network_steps(self, settings: GenerateSettings) -> int:
        """Steps of all stages together, for one picture."""
        return sum(stage.settings(settings, number).steps for number, stage in enumerate(self.of(settings)))

    def condition(
        self, text: TextCondition, neighbors: Sequence[NeighborBatch] | None, settings: GenerateSettings
    ) -> tuple[Condition, ...]:
        """One condition a stage; `neighbors` has a batch for each, at its size (None: nobody has a neighbour)."""
        stages = self.of(settings)
        batches = [None] * len(stages) if neighbors is None else [to_device(each, self.device) for each in neighbors]
        text = to_device(text, self.device)
        return tuple(stage.condition(text, batch) for stage, batch in zip(stages, batches, strict=True))

    @torch.inference_mode()
    def sample(
        self,
        conditions: Sequence[Condition],
        settings: GenerateSettings,
        seeds: Sequence[int],
        on_step: Callable[[int], None] = lambda done: None,
        *,
        init: InitImage | None = None,
        on_call: OnCall = lambda rows: None,
    ) -> Pixels:
        """One batch of pictures, one a row of the conditions, each from its own seed. `on_step` counts network steps.

        With `init` the stages that are not larger start from that picture (`radt/image_to_image.py`). `on_call` is
        told the rows that every network call spends on each picture.

        A picture's generators live on the CPU, so that a seed means the same everywhere, and each stage has its own,
        so that what a stage draws at random does not depend on how the one below was sampled.
        """
        pictures: Pixels | None = None
        done = 0
        for number, (stage, condition) in enumerate(zip(self.of(settings), conditions, strict=True)):
            generators = [stage_generator(seed, number) for seed in seeds]
            if pictures is not None:
                low_res = augment(
                    resize(pictures, stage.size),
                    settings.augmentation_level,
                    schedule=stage.info.schedule,
                    generators=generators,
                )
                condition = replace(condition, low_res=low_res)
            asked = stage.settings(settings, number)

            def report(step: int, before: int = done) -> None:
                on_step(before + (step + 1) * len(seeds))

            start = None if init is None else init.at(stage.size)
            pictures = sample_stage(
                stage, condition, asked, generators=generators, init=start, on_step=report, on_call=on_call
            )
            done += asked.steps * len(seeds)
        assert pictures is not None, "a cascade has a stage"
        return pictures


def sample_stage(
    stage: Stage,
    condition: Condition,
    settings: GenerateSettings,
    *,
    generators: Generators,
    init: Start | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    on_call: OnCall = lambda rows: None,
) -> Pixels:
    """What one stage draws, in [-1, 1]: noise, guidance branches and the sampler's own noise from the generators.

    `init` is a picture to start from instead of noise alone.
    """
    if init is not None and stage.fast is not None and stage.fast.steps is not None:
        raise ConfigError("a fast twin of few steps starts from noise alone: leave out --fast or the picture")
    device = condition.text.tokens.device
    noise = draw_noise(torch.empty(len(generators), 3, *stage.size, device=device), generators)
    x, t = starting_point(init, noise, strength=settings.strength, schedule=stage.info.schedule)
    times = stage.info.schedule.time_steps(settings.steps, t_max=t)
    has_neighbors = condition.neighbors is not None
    plans = [
        plan_guidance(settings, times, generator=generator, has_neighbors=has_neighbors) for generator in generators
    ]
    if stage.fast:
        denoise = stage.one_row(condition, settings, on_call=on_call)
    else:
        denoise = guided(stage.denoiser, condition, plans, threshold=find_threshold(settings), on_call=on_call)
    x0 = find_sampler(settings)(
        denoise,
        x,
        times,
        schedule=stage.info.schedule,
        generators=generators,
        branches=None if stage.fast else plans,
        on_step=lambda step, _: on_step(step),
    )
    return x0.clamp(-1, 1)


def augment(
    pictures: Pixels, level: float | PerExample, *, schedule: NoiseSchedule, generators: Generators
) -> LowResolution:
    """Noise conditioning augmentation (Saharia et al. 2022, section 2.5): noise over the picture below, and its level.

    The stage is told how far to trust that picture: what the stage below drew badly hides in the noise.
    """
    levels = torch.as_tensor(level, dtype=torch.float32, device=pictures.device).expand(len(pictures))
    noised = schedule.add_noise(pictures, draw_noise(pictures, generators), levels)
    return LowResolution(pixels=noised, level=levels)


def stages_of(bundle: Bundle) -> list[Stage]:
    """The stages of a loaded bundle, each with its twin if it has one."""
    stages = []
    for unet, twin, info in zip(bundle.unets, bundle.twins, bundle.info.stages, strict=True):
        fast = None if twin is None else Stage(unet=twin, info=info, fast=info.fast)
        stages.append(Stage(unet=unet, info=info, twin=fast))
    return stages


def of_stage(settings: GenerateSettings, number: int) -> GenerateSettings:
    """The settings as one stage reads them: above the first, those that begin with `sr_` stand for the others."""
    if number == 0:
        return settings
    return replace(
        settings,
        steps=settings.sr_steps,
        text_guidance=settings.sr_text_guidance,
        neighbor_guidance=settings.sr_neighbor_guidance,
    )


def stage_generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of one stage of one picture; those of the first are the seed's own."""
    if number:
        seed = int.from_bytes(blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(seed)


def find_sampler(settings: GenerateSettings) -> Sampler:
    """The sampler asked for; a ConfigError lists the names there are."""
    if settings.sampler not in SAMPLERS:
        raise ConfigError(f"sampler {settings.sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if settings.sampler == "ancestral":
        return partial(sample_ancestral, gamma=settings.gamma)
    return SAMPLERS[settings.sampler]


def find_threshold(settings: GenerateSettings) -> Threshold:
    """What keeps the clean image in range."""
    if settings.threshold == "dynamic":
        return dynamic_threshold(settings.steps, percentile=settings.percentile)
    return static_threshold
