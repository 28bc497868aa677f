"""`radt train emoji-demo-fast --out RUN`: a stage of a bundle gets a fast twin (row I10; `radt/diffusion/distill.py`).

A run's folder holds, beside `config.json` and the pack (as every run's, `radt/training/run.py`),

    guided/  16-steps/  8-steps/    one folder a phase, each a run of its own: state.safetensors, metrics.jsonl
    bundle/                         the teacher's bundle with the averaged student beside the stage, after every save

The same command again goes on in the phase that was cut off, and with fewer `steps` goes on halving.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from index.errors import ConfigError
from radt.bundle import FastTwin, StageInfo, add_twin, read_info
from radt.conditioning import Condition, GuidanceInput, LowResolution
from radt.diffusion.denoiser import Denoiser, eps_from_x0
from radt.diffusion.distill import guided_x0, random_guidance, told, two_steps_as_one
from radt.diffusion.loss import Weighting, diffusion_loss, sample_times
from radt.shapes import PerExample, Pixels
from radt.training.data import Batch, DataConfig
from radt.training.emoji_pack import PackConfig
from radt.training.follow import OnStep
from radt.training.loop import LoopConfig, Objective, Run
from radt.training.optim import OptimConfig
from radt.training.pack import Pack
from radt.unet.unet import UNet


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """A run that distils one stage. The guided network that comes first is taken to need `first_steps` DDIM steps.

    `loop.num_steps` are the updates of the guided phase, `halving_updates` those of each halving; the rate of learning
    falls to 0 in each (Salimans and Ho 2022, appendix D).
    """

    bundle: str
    stage: int = 0
    first_steps: int = 32
    steps: int | None = 8  # where halving ends; None: guidance alone is distilled
    highest_guidance: float = 4.0
    halving_updates: int = 3000
    weighting: Weighting = "v"  # 1 + SNR on x0 (Salimans and Ho 2022, section 4)
    augmentation: float = 0.5  # of a super-resolution stage, as it was trained
    pack: PackConfig = field(default_factory=PackConfig)
    pack_file: str | None = None  # the pack of another run; None: one is made
    data: DataConfig = field(default_factory=lambda: DataConfig(batch_size=32))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, warmup_steps=50, cooldown_share=1.0))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(num_steps=6000))

    def __post_init__(self) -> None:
        if self.halving_updates < 1:
            raise ConfigError(f"halving_updates must be at least 1, got {self.halving_updates}")
        if not (math.isfinite(self.highest_guidance) and self.highest_guidance >= 1):
            raise ConfigError(f"highest_guidance must be 1 (no guidance) or more, got {self.highest_guidance}")
        if self.steps is not None and self.steps not in halvings(self.first_steps):
            raise ConfigError(
                f"steps must be first_steps, {self.first_steps}, halved some times over, got {self.steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One student: the DDIM steps it will take (None: any number, its teacher is guided) and its training."""

    steps: int | None
    loop: LoopConfig

    @property
    def name(self) -> str:
        """Its folder."""
        return "guided" if self.steps is None else f"{self.steps}-steps"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Distillation:
    """What a student is taught. `plain` says how both networks were trained to answer, and under which noise.

    With `steps` None the teacher knows no guidance input and is guided in three rows; otherwise it is a student of an
    earlier phase, and two of its steps become one.
    """

    plain: Objective
    teacher: UNet
    steps: int | None
    highest_guidance: float

    def loss(self, network: UNet, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch, at stratified random times of those that the student will be asked at."""
        guidance = random_guidance(len(batch.x0), highest=self.highest_guidance, generator=generator)
        t = self.draw_times(len(batch.x0), generator)
        eps = torch.randn(batch.x0.shape, generator=generator, device=generator.device)
        x = self.plain.schedule.add_noise(batch.x0, eps, t)
        low_res = self.plain.draw_low_res(network, batch.x0, generator)
        wanted = self.target(x, t, batch, guidance=guidance, low_res=low_res)
        neighbors = network.project_neighbors(batch.neighbors)
        output = network(x, t, batch.text, neighbors, low_res=low_res, guidance=guidance)
        return diffusion_loss(
            output,
            x0=wanted,
            eps=eps_from_x0(wanted, x, t, schedule=self.plain.schedule),
            t=t,
            schedule=self.plain.schedule,
            prediction=self.plain.prediction,
            weighting=self.plain.weighting,
        ).mean()

    def draw_times(self, count: int, generator: torch.Generator) -> PerExample:
        """Anywhere in [0, 1], or on the student's own grid i / steps, i from 1."""
        t = sample_times(generator, count)
        return t if self.steps is None else (torch.floor(t * self.steps) + 1).clamp(max=self.steps) / self.steps

    @torch.no_grad()
    def target(
        self, x: Pixels, t: PerExample, batch: Batch, *, guidance: GuidanceInput, low_res: LowResolution | None
    ) -> Pixels:
        """The clean image to answer with. In float32 throughout, since the student's error adds to the target's."""
        with torch.autocast(x.device.type, enabled=False):
            neighbors = self.teacher.project_neighbors(batch.neighbors)
            condition = Condition(text=batch.text, neighbors=neighbors, low_res=low_res)
            if self.steps is None:
                return guided_x0(self._denoiser(None), x, t, condition=condition, guidance=guidance)
            denoiser = self._denoiser(guidance)

            def clipped(x: Pixels, t: PerExample) -> Pixels:
                return denoiser(x, t, condition).clamp(-1, 1)

            end = (torch.round(t * self.steps) - 1) / self.steps
            return two_steps_as_one(clipped, x, t, end, schedule=self.plain.schedule)

    def _denoiser(self, guidance: GuidanceInput | None) -> Denoiser:
        network = self.teacher if guidance is None else told(self.teacher, guidance)
        return Denoiser(network, schedule=self.plain.schedule, prediction=self.plain.prediction)


def distill(
    config: DistillConfig,
    teacher: UNet,
    pack: Pack,
    *,
    out: Path,
    on_step: OnStep = lambda _: None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Path:
    """Run every phase, each student the next one's teacher; returns the bundle. Phases that are over are read back."""
    stage = find_stage(config)
    plain = Objective(
        schedule=stage.schedule,
        prediction=stage.prediction,
        weighting=config.weighting,
        augmentation=config.augmentation,
    )
    todo = list(phases(config))
    torch.manual_seed(config.loop.seed)  # of what the first student has and its teacher has not
    student = make_student(teacher)
    for phase in todo:
        teaching = Distillation(
            plain=plain, teacher=teacher, steps=phase.steps, highest_guidance=config.highest_guidance
        )
        on_stage(f"distilling: {phase.name}")
        run = Run(
            student,
            pack,
            out / phase.name,
            data=config.data,
            optim=config.optim,
            loop=phase.loop,
            objective=teaching,
        )
        teacher.to(run.accelerator.device)
        if run.step < phase.loop.num_steps or phase is todo[-1]:
            run.train(on_step=on_step, on_save=partial(_leave_bundle, config=config, phase=phase, out=out))
        teacher = averaged(run)
        student = make_student(teacher)
    return out / "bundle"


def make_student(teacher: UNet) -> UNet:
    """A copy that can be told its guidance, whether the teacher could or not: it starts by answering as the teacher."""
    student = UNet(replace(teacher.config, guidance_input=True))
    own = {name: tensor for name, tensor in student.state_dict().items() if name.startswith("embedding.guidance.")}
    student.load_state_dict(own | teacher.state_dict())
    return student


def averaged(run: Run) -> UNet:
    """The averaged weights of a run, as a network that is not trained any more."""
    network = UNet(run.network.config)
    network.load_state_dict(run.ema.state())
    return network.to(run.accelerator.device).eval().requires_grad_(requires_grad=False)


def halvings(first: int) -> list[int]:
    """`first` and what comes of halving it while it is even: 24 gives 24, 12, 6, 3."""
    if first < 1:
        raise ConfigError(f"first_steps must be at least 1, got {first}")
    return [first, *(halvings(first // 2) if first % 2 == 0 else ())]


def phases(config: DistillConfig) -> Iterator[Phase]:
    """Guidance first, then one halving after the other; each draws its own random numbers."""
    yield Phase(steps=None, loop=config.loop)
    if config.steps is not None:
        for number, steps in enumerate(halvings(config.first_steps)[1:], start=1):
            if steps >= config.steps:
                loop = replace(config.loop, num_steps=config.halving_updates, seed=config.loop.seed + number)
                yield Phase(steps=steps, loop=loop)


def find_stage(config: DistillConfig) -> StageInfo:
    """The stage to distil; a ConfigError when the bundle has no such one."""
    stages = read_info(Path(config.bundle)).stages
    if not 0 <= config.stage < len(stages):
        raise ConfigError(f"stage {config.stage} was asked for and {config.bundle!r} has stages 0 to {len(stages) - 1}")
    return stages[config.stage]


def _leave_bundle(run: Run, *, config: DistillConfig, phase: Phase, out: Path) -> None:
    if not run.accelerator.is_main_process:
        return
    twin = FastTwin(name=f"{find_stage(config).name}-fast", steps=phase.steps, highest_guidance=config.highest_guidance)
    add_twin(out / "bundle", bundle=Path(config.bundle), stage=config.stage, unet=averaged(run), twin=twin)
