"""Distillation: targets with closed forms, a network that is told its guidance, and what a twin may be asked."""

import json
import math
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from index.config import from_dict, to_dict
from index.errors import ConfigError
from radt.bundle import BundleInfo, FastTwin, StageInfo, default_bundle, read_info
from radt.cascade import Cascade, Stage
from radt.conditioning import Condition, GuidanceInput, LowResolution
from radt.diffusion.denoiser import Denoiser, eps_from_x0, target
from radt.diffusion.distill import (
    ddim_step,
    guided_x0,
    one_row,
    random_guidance,
    same_guidance,
    told,
    two_steps_as_one,
)
from radt.diffusion.samplers import sample_ddim
from radt.diffusion.schedule import NoiseSchedule
from radt.fast import settle
from radt.settings import GenerateSettings
from radt.training.data import DataConfig, draw_batch
from radt.training.distill_run import Distillation, DistillConfig, halvings, make_student, phases
from radt.training.loop import Objective
from radt.unet.unet import UNet, UNetConfig
from tests.networks import generator, new_unet, random_neighbors, random_pixels, random_text, random_unet, randomize
from tests.packs import small_pack

COSINE = NoiseSchedule()
SPREAD = 0.5  # standard deviation of the Gaussian data
PIXEL = (1, 1, 1)  # one image of one pixel: closed forms are of numbers


def gaussian_x0(x: Tensor, t: Tensor, spread: float = SPREAD) -> Tensor:
    """The mean of x0 given x_t where x0 is Gaussian with mean 0."""
    alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
    return (alpha * spread**2 / (alpha**2 * spread**2 + sigma**2))[:, None, None, None] * x


def wavy_x0(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser without a closed form."""
    return torch.sin(3 * x + t[:, None, None, None])


def guidance(*dials: tuple[float, float, float]) -> GuidanceInput:
    w_p, w_n, eta = torch.tensor(dials, dtype=torch.float32).T
    return GuidanceInput(text_guidance=w_p, neighbor_guidance=w_n, text_share=eta)


def condition_for(unet: UNet, rows: int, *, low_res: LowResolution | None = None) -> Condition:
    neighbors = unet.project_neighbors(random_neighbors(rows, 2))
    return Condition(text=random_text(rows), neighbors=neighbors, low_res=low_res)


def denoiser_of(network: Any) -> Denoiser:
    return Denoiser(network, schedule=COSINE, prediction="v")


# Two steps as one


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_one_step_of_a_perfect_student_lands_where_two_of_the_teacher_do(steps: int) -> None:
    """The slow twin is the sampler itself, over three times of the teacher's own grid."""
    times = COSINE.time_steps(2 * steps, t_max=1.0)
    assert times[::2] == pytest.approx(COSINE.time_steps(steps))
    for t, middle, t_next in zip(times[::2], times[1::2], times[2::2], strict=False):
        x, at, end = torch.randn(1, *PIXEL, generator=generator()), torch.tensor([t]), torch.tensor([t_next])
        taught = two_steps_as_one(wavy_x0, x, at, end, schedule=COSINE)
        if t_next == 0:
            middle_x = ddim_step(x, wavy_x0(x, at), at, torch.tensor([middle]), schedule=COSINE)
            assert torch.equal(taught, wavy_x0(middle_x, torch.tensor([middle])))
            continue
        once = ddim_step(x, taught, at, end, schedule=COSINE)
        twice = x
        for now, then in pairwise([t, middle, t_next]):
            x0 = wavy_x0(twice, torch.tensor([now]))
            alpha, sigma = COSINE.alpha(now), COSINE.sigma(now)
            twice = COSINE.alpha(then) * x0 + COSINE.sigma(then) * (twice - alpha * x0) / sigma
        torch.testing.assert_close(once, twice, rtol=1e-5, atol=2e-6)


def test_the_target_is_the_papers_own_expression() -> None:
    t, end = torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.5, 0.5, 0.25])
    x = torch.randn(3, 1, 2, 2, generator=generator())
    middle = (t + end) / 2
    z = ddim_step(x, wavy_x0(x, t), t, middle, schedule=COSINE)
    z = ddim_step(z, wavy_x0(z, middle), middle, end, schedule=COSINE)
    ratio = (COSINE.sigma(end) / COSINE.sigma(t))[:, None, None, None]
    paper = (z - ratio * x) / ((COSINE.alpha(end) - ratio.flatten() * COSINE.alpha(t))[:, None, None, None])
    torch.testing.assert_close(two_steps_as_one(wavy_x0, x, t, end, schedule=COSINE), paper, rtol=1e-4, atol=1e-5)


def test_the_target_lies_between_the_teachers_two_answers() -> None:
    t, end = torch.rand(64, generator=generator()) * 0.5 + 0.5, torch.rand(64, generator=generator(1)) * 0.5
    x = torch.randn(64, *PIXEL, generator=generator(2)) * 3
    seen: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(wavy_x0(x, t))
        return seen[-1]

    taught = two_steps_as_one(watched, x, t, end, schedule=COSINE)
    low, high = torch.minimum(*seen), torch.maximum(*seen)
    assert ((taught >= low - 1e-6) & (taught <= high + 1e-6)).all()


def test_halving_on_gaussian_data_ends_in_the_known_optimum() -> None:
    """256 steps halved eight times: one step that does what 256 did, which is nearly what the ODE itself does.

    The probability-flow ODE keeps every image's place in the distribution: x0 = z SPREAD / std(z).
    """
    gains = {i: float(gaussian_x0(torch.ones(1, *PIXEL), torch.tensor([i / 256]))) for i in range(1, 257)}
    steps = 256
    while steps > 1:
        steps //= 2

        def student(x: Tensor, t: Tensor, known: dict[int, float] = gains) -> Tensor:
            return known[round(float(t) * 256)] * x

        places = [256 // steps * i for i in range(1, steps + 1)]
        gains = {
            place: float(
                two_steps_as_one(
                    student,
                    torch.ones(1, *PIXEL, dtype=torch.float64),
                    torch.tensor([place / 256], dtype=torch.float64),
                    torch.tensor([(place - 256 // steps) / 256], dtype=torch.float64),
                    schedule=COSINE,
                )
            )
            for place in places
        }
    optimum = SPREAD / math.sqrt(COSINE.alpha(1.0) ** 2 * SPREAD**2 + COSINE.sigma(1.0) ** 2)
    z = torch.ones(1, *PIXEL, dtype=torch.float64)
    all_steps = sample_ddim(
        lambda x, t, step: gaussian_x0(x, torch.tensor([t])), z, COSINE.time_steps(256), schedule=COSINE, generators=[]
    )
    assert gains[256] == pytest.approx(float(all_steps), rel=1e-5)
    assert gains[256] == pytest.approx(optimum, rel=0.01)


# Guidance as an input


def test_the_guided_target_is_the_mean_of_both_branches_row_by_row() -> None:
    teacher, rows = random_unet(), 3
    given, x, t = condition_for(teacher, rows), random_pixels(rows), torch.tensor([0.2, 0.5, 0.9])
    dials = [(1.0, 3.0, 0.25), (2.5, 1.0, 1.0), (4.0, 2.0, 0.5)]
    denoiser = denoiser_of(teacher)
    found = guided_x0(denoiser, x, t, condition=given, guidance=guidance(*dials))
    whole, untold, alone = (denoiser(x, t, each) for each in (given, given.drop_text(), given.drop_neighbors()))
    for row, (w_p, w_n, eta) in enumerate(dials):
        text = (w_p * whole[row] - (w_p - 1) * untold[row]).clamp(-1, 1)
        neighbor = (w_n * whole[row] - (w_n - 1) * alone[row]).clamp(-1, 1)
        torch.testing.assert_close(found[row], eta * text + (1 - eta) * neighbor, rtol=1e-4, atol=1e-5)


def test_weights_of_1_teach_the_plain_prediction() -> None:
    teacher = random_unet()
    given, x, t = condition_for(teacher, 2), random_pixels(2), torch.tensor([0.3, 0.6])
    found = guided_x0(denoiser_of(teacher), x, t, condition=given, guidance=guidance((1, 1, 0.3), (1, 1, 0.8)))
    torch.testing.assert_close(found, denoiser_of(teacher)(x, t, given).clamp(-1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_interleaving_goes_to_the_mean_of_its_branches_as_steps_become_many(share: float) -> None:
    """Gaussian data, each condition with a spread of its own: the distance from the mean field's result halves with h.

    Hence the last step, which takes one branch alone, has no lasting effect either.
    """

    def guided(x: Tensor, t: float, weight: float, without: float) -> Tensor:
        at = torch.tensor([t], dtype=x.dtype)
        return weight * gaussian_x0(x, at) - (weight - 1) * gaussian_x0(x, at, without)

    def text(x: Tensor, t: float) -> Tensor:
        return guided(x, t, 3.0, 0.8)

    def neighbor(x: Tensor, t: float) -> Tensor:
        return guided(x, t, 2.0, 0.6)

    def result(steps: int, *, is_mean: bool) -> float:
        def denoise(x: Tensor, t: float, step: int) -> Tensor:
            if is_mean:
                return share * text(x, t) + (1 - share) * neighbor(x, t)
            return text(x, t) if math.floor((step + 1) * share) > math.floor(step * share) else neighbor(x, t)

        z, times = torch.ones(1, *PIXEL, dtype=torch.float64), COSINE.time_steps(steps)
        return float(sample_ddim(denoise, z, times, schedule=COSINE, generators=[]))

    gaps = [abs(result(steps, is_mean=False) - result(steps, is_mean=True)) for steps in (64, 128, 256)]
    assert gaps[0] < 0.1
    assert all(1.7 < before / after < 2.3 for before, after in pairwise(gaps))


def test_a_new_student_answers_as_its_teacher_whatever_it_is_told() -> None:
    teacher = random_unet()
    student = make_student(teacher).eval()
    assert student.config == replace(teacher.config, guidance_input=True)
    x, t, text = random_pixels(2), torch.tensor([0.1, 0.7]), random_text(2)
    neighbors = teacher.project_neighbors(random_neighbors(2, 2))
    wanted = teacher(x, t, text, neighbors)
    assert torch.equal(student(x, t, text, neighbors, guidance=guidance((3, 2, 0.5), (1, 4, 0))), wanted)
    assert torch.equal(student(x, t, text, neighbors), wanted)


@pytest.mark.parametrize("other", [(3.0, 1.5, 0.5), (2.0, 3.0, 0.5), (2.0, 1.5, 0.9)])
def test_every_dial_moves_a_trained_student(other: tuple[float, float, float]) -> None:
    student = make_student(random_unet())
    randomize(student, 3)
    x, t, text = random_pixels(1), torch.tensor([0.5]), random_text(1)
    one, two = (student(x, t, text, guidance=guidance(dials)) for dials in ((2.0, 1.5, 0.5), other))
    assert not torch.allclose(one, two, atol=1e-4)


def test_a_student_of_a_student_keeps_what_it_was_taught() -> None:
    student = make_student(random_unet())
    randomize(student, 3)
    x, t, text, dials = random_pixels(1), torch.tensor([0.5]), random_text(1), guidance((2.0, 1.5, 0.5))
    assert torch.equal(make_student(student)(x, t, text, guidance=dials), student(x, t, text, guidance=dials))


def test_a_network_without_the_input_is_not_told() -> None:
    teacher = random_unet()
    with pytest.raises(AssertionError, match="guidance_input"):
        teacher(random_pixels(1), torch.tensor([0.5]), random_text(1), guidance=guidance((2, 2, 0.5)))


def test_old_configurations_and_weights_have_no_guidance_input() -> None:
    values = to_dict(new_unet().config)
    del values["guidance_input"]
    assert not from_dict(UNetConfig, values).guidance_input
    assert not [name for name in new_unet().state_dict() if "guidance" in name]


def test_one_row_an_image_and_step() -> None:
    student = make_student(random_unet())
    randomize(student, 3)
    given, x, calls = condition_for(student, 2), random_pixels(2), []
    dials = same_guidance(2, text_guidance=3, neighbor_guidance=2, text_share=0.5, device=x.device)
    denoise = one_row(denoiser_of(told(student, dials)), given, on_call=calls.append)
    found = denoise(x, 0.5, 0)
    raw = student(x, torch.full((2,), 0.5), given.text, given.neighbors, guidance=guidance((3, 2, 0.5), (3, 2, 0.5)))
    alpha, sigma = COSINE.alpha(0.5), COSINE.sigma(0.5)
    torch.testing.assert_close(found, (alpha * x - sigma * raw).clamp(-1, 1))
    assert calls == [[1, 1]]


def test_guidance_is_drawn_within_what_is_taught() -> None:
    drawn = random_guidance(2000, highest=4.0, generator=generator())
    for weights in (drawn.text_guidance, drawn.neighbor_guidance):
        assert 1 <= weights.min() < 1.1
        assert 3.9 < weights.max() <= 4
    assert 0 <= drawn.text_share.min() < 0.05
    assert 0.95 < drawn.text_share.max() <= 1
    assert not torch.equal(drawn.text_guidance, drawn.neighbor_guidance)


# The objective


def teaching(teacher: UNet, steps: int | None, **changes: Any) -> Distillation:
    return Distillation(plain=Objective(schedule=COSINE), teacher=teacher, steps=steps, highest_guidance=4.0, **changes)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_halved_student_is_taught_at_its_own_times_alone(steps: int) -> None:
    times = teaching(random_unet(), steps).draw_times(64, generator()) * steps
    torch.testing.assert_close(times, times.round())
    assert set(times.round().int().tolist()) == set(range(1, steps + 1))


@pytest.mark.parametrize("steps", [None, 4])
def test_the_loss_is_the_error_against_the_target_and_reaches_the_student_alone(steps: int | None) -> None:
    teacher = random_unet() if steps is None else make_student(random_unet())
    teacher.requires_grad_(requires_grad=False)
    student = make_student(random_unet(1))
    batch = draw_batch(small_pack(), DataConfig(batch_size=4), generator())
    loss = teaching(teacher, steps).loss(student, batch, generator(5))
    again = generator(5)  # the same draws, in the order the loss makes them
    dials = random_guidance(4, highest=4.0, generator=again)
    t = teaching(teacher, steps).draw_times(4, again)
    eps = torch.randn(batch.x0.shape, generator=again)
    x = COSINE.add_noise(batch.x0, eps, t)
    wanted = teaching(teacher, steps).target(x, t, batch, guidance=dials, low_res=None)
    output = student(x, t, batch.text, student.project_neighbors(batch.neighbors), guidance=dials)
    answer = target(wanted, eps_from_x0(wanted, x, t, schedule=COSINE), t, schedule=COSINE, prediction="v")
    torch.testing.assert_close(loss, ((output - answer) ** 2).mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert float(student.embedding.guidance[-1].weight.grad.abs().sum()) > 0  # type: ignore[index, union-attr]


def test_a_step_down_the_gradient_lowers_the_loss() -> None:
    student, batch = make_student(random_unet()), draw_batch(small_pack(), DataConfig(batch_size=4), generator())
    lesson = teaching(random_unet().requires_grad_(requires_grad=False), None)
    before = lesson.loss(student, batch, generator(5))
    before.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    assert lesson.loss(student, batch, generator(5)) < before


@pytest.mark.parametrize("steps", [None, 2])
def test_a_super_resolution_stage_is_taught_over_the_same_picture_as_its_teacher(steps: int | None) -> None:
    """At level 0 of the augmentation nothing is drawn at random, so the target can be made again by hand."""
    teacher = make_student(random_unet(low_res_size=8))
    lesson = Distillation(
        plain=Objective(schedule=COSINE, augmentation=0.0), teacher=teacher, steps=steps, highest_guidance=2.0
    )
    batch = draw_batch(small_pack(), DataConfig(batch_size=2), generator())
    assert torch.isfinite(lesson.loss(make_student(teacher), batch, generator(5)))
    x, t, dials = random_pixels(2), torch.tensor([0.5, 1.0]), guidance((2, 1, 0.5), (1, 2, 0.5))
    over = lesson.plain.draw_low_res(teacher, batch.x0, generator())
    assert over is not None
    other = replace(over, pixels=-over.pixels)
    one, two = (lesson.target(x, t, batch, guidance=dials, low_res=each) for each in (over, other))
    assert not torch.allclose(one, two, atol=1e-4)


# The run's plan


def test_phases_halve_down_to_the_steps_asked_for() -> None:
    config = DistillConfig(bundle="b", first_steps=32, steps=4, halving_updates=7)
    names = [phase.name for phase in phases(config)]
    assert names == ["guided", "16-steps", "8-steps", "4-steps"]
    assert [phase.loop.num_steps for phase in phases(config)] == [config.loop.num_steps, 7, 7, 7]
    assert len({phase.loop.seed for phase in phases(config)}) == 4
    assert [phase.name for phase in phases(replace(config, steps=None))] == ["guided"]
    assert halvings(24) == [24, 12, 6, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 5}, "steps must be first_steps, 32, halved some times over, got 5"),
        ({"highest_guidance": 0.5}, "highest_guidance must be 1"),
        ({"first_steps": 0}, "first_steps must be at least 1"),
        ({"halving_updates": 0}, "halving_updates must be at least 1"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistillConfig(bundle="b", **changes)


# What a request may ask of a twin


def stages_with(*twins: FastTwin | None) -> list[Stage]:
    return [
        Stage(unet=new_unet(), info=StageInfo(name=f"stage{number}"), fast=twin) for number, twin in enumerate(twins)
    ]


EIGHT = FastTwin(name="stage0-fast", steps=8, highest_guidance=4.0)


def test_a_twin_of_few_steps_fixes_steps_and_sampler() -> None:
    settled = settle(GenerateSettings(fast=True), stages_with(EIGHT), named=["fast"])
    assert (settled.steps, settled.sampler) == (8, "ddim")
    both = settle(GenerateSettings(fast=True), stages_with(EIGHT, replace(EIGHT, steps=4)), named=[])
    assert (both.steps, both.sr_steps, both.sampler) == (8, 4, "ddim")
    mixed = settle(GenerateSettings(fast=True), stages_with(EIGHT, None), named=[])
    assert (mixed.steps, mixed.sr_steps, mixed.sampler) == (8, GenerateSettings().sr_steps, GenerateSettings().sampler)


def test_a_twin_beside_an_ordinary_stage_above_leaves_it_its_steps() -> None:
    three = stages_with(None, replace(EIGHT, steps=4), None)
    settled = settle(GenerateSettings(fast=True, sr_steps=12), three, named=["sr_steps"])
    assert [stage.settings(settled, number).steps for number, stage in enumerate(three)] == [settled.steps, 4, 12]


def test_a_twin_that_was_not_halved_leaves_them_free() -> None:
    asked = GenerateSettings(fast=True, steps=12, sampler="heun")
    assert settle(asked, stages_with(replace(EIGHT, steps=None)), named=["steps", "sampler"]) == asked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 20}, "distilled to steps 8, got 20"),
        ({"sampler": "heun"}, "distilled to sampler ddim, got heun"),
        ({"order": "coin"}, "order would have no effect"),
        ({"text_guidance": 5.0}, "text_guidance 5 is more than the fast twin of 'stage0' was taught, 4"),
        ({"neighbor_guidance": 9.0}, "neighbor_guidance 9 is more"),
        ({"guidance": "joint"}, "guidance joint is not what a fast twin was taught"),
        ({"negative_prompt": "blue"}, "negative_prompt blue is not"),
    ],
)
def test_what_a_twin_cannot_do_is_refused_in_a_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settle(GenerateSettings(fast=True, **changes), stages_with(EIGHT), named=list(changes))


def test_a_model_without_a_twin_says_so() -> None:
    cascade = Cascade([Stage(unet=new_unet(), info=StageInfo(name="stage0"))])
    with pytest.raises(ConfigError, match="no fast twin: leave out --fast"):
        cascade.of(GenerateSettings(fast=True))


# Bundles


def digest_as_written(folder: Path) -> str:
    """The digest as it was computed before there were twins, from the file's own JSON."""
    values = json.loads((folder / "bundle.json").read_text())
    files = sorted((each["path"], each["digest"]) for each in values["files"])
    facts = {"stages": values["stages"], "files": files}
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def test_the_shipped_bundle_keeps_the_digest_that_its_pictures_name() -> None:
    info = read_info(default_bundle())
    if all(stage.fast is None for stage in info.stages):
        assert info.digest == digest_as_written(default_bundle())


def test_a_twin_changes_the_digest_and_survives_json() -> None:
    plain = BundleInfo(name="m", stages=(StageInfo(name="stage0"),))
    with_twin = replace(plain, stages=(replace(plain.stages[0], fast=EIGHT),))
    assert plain.digest != with_twin.digest
    assert from_dict(BundleInfo, json.loads(json.dumps(to_dict(with_twin)))) == with_twin
