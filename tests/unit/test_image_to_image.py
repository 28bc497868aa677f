"""SDEdit in closed form: what strength keeps of the picture, and which stages of a cascade start from it."""

import dataclasses
import math

import pytest
import torch
from PIL import Image
from torch import Tensor

from index.errors import ConfigError, QueryError
from radt.diffusion.samplers import SAMPLERS, draw_noise
from radt.diffusion.schedule import NoiseSchedule
from radt.image_to_image import InitImage, make_init_image, read_init_image, starting_point
from radt.settings import GenerateSettings
from tests.networks import IMAGE_SIZE, generator
from tests.unit.test_cascade import LARGE, SETTINGS, TWO, neighbors_at, random_neighbors, random_text

SCHEDULE = NoiseSchedule()
MEAN, DEVIATION = 0.3, 0.5  # of the data in the closed form


def gaussian(x: Tensor, t: float, step: int) -> Tensor:
    """The exact x0 of data N(MEAN, DEVIATION^2): the posterior mean of a Gaussian seen through Gaussian noise."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def edit(init: Tensor, strength: float, *, steps: int = 200) -> Tensor:
    noise = draw_noise(torch.empty(len(init), 3, 4, 4), [generator(seed) for seed in range(len(init))])
    x, t = starting_point(init, noise, strength=strength, schedule=SCHEDULE)
    times = SCHEDULE.time_steps(steps, t_max=t)
    return SAMPLERS["heun"](gaussian, x, times, schedule=SCHEDULE, generators=[generator()] * len(init))


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_an_edit_of_gaussian_data_is_what_the_exact_flow_makes_of_the_noised_picture(strength: float) -> None:
    """The flow maps x_t to MEAN + DEVIATION (x_t - alpha MEAN) / sqrt(alpha^2 DEVIATION^2 + sigma^2)."""
    init = torch.full((2, 3, 4, 4), -0.8)
    noise = draw_noise(torch.empty(2, 3, 4, 4), [generator(0), generator(1)])
    alpha, sigma = SCHEDULE.alpha(strength), SCHEDULE.sigma(strength)
    noised = alpha * init + sigma * noise
    spread = math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
    exact = MEAN + DEVIATION * (noised - alpha * MEAN) / spread
    assert torch.allclose(edit(init, strength), exact, atol=2e-3)


def test_strength_near_0_returns_the_picture_and_1_forgets_it() -> None:
    init = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    assert torch.allclose(edit(init, 1e-3), init, atol=5e-3)
    assert torch.allclose(edit(init, 1.0), edit(-init, 1.0), atol=2e-3)


def test_at_strength_1_only_alpha_of_the_picture_is_left_in_the_noise() -> None:
    noise = torch.randn(2, 3, 4, 4, generator=generator())
    x, t = starting_point(torch.ones(1, 3, 4, 4), noise, strength=1.0, schedule=SCHEDULE)
    assert t == 1.0
    assert torch.allclose(x, noise, atol=1.1 * SCHEDULE.alpha(1.0))
    assert starting_point(None, noise, strength=0.3, schedule=SCHEDULE) == (noise, 1.0)


def draw(settings: GenerateSettings, init: InitImage | None) -> Tensor:
    batch = random_neighbors(1, 2)
    sizes = [stage.size for stage in TWO.of(settings)]
    conditions = TWO.condition(random_text(1), [neighbors_at(size, batch) for size in sizes], settings)
    return TWO.sample(conditions, settings, [5], init=init)


def picture(side: int) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side)).convert("RGB")


def init_of(side: int) -> InitImage:
    return make_init_image(picture(side), [stage.size for stage in TWO.stages])


def test_every_stage_that_is_not_larger_starts_from_the_picture() -> None:
    """A picture as large as the last stage comes back at strength 0, detail and all; a small one is drawn larger."""
    kept = dataclasses.replace(SETTINGS, strength=1e-4)
    large, small = init_of(LARGE), init_of(IMAGE_SIZE)
    assert (large.pixels.shape[:2], small.pixels.shape[:2]) == ((LARGE, LARGE), (IMAGE_SIZE, IMAGE_SIZE))
    assert torch.allclose(draw(kept, large), large.at((LARGE, LARGE)), atol=0.01)
    assert small.at((LARGE, LARGE)) is None
    assert not torch.allclose(draw(kept, small), large.at((LARGE, LARGE)), atol=0.2)
    one = dataclasses.replace(kept, stages=1)
    assert torch.allclose(draw(one, small), small.at((IMAGE_SIZE, IMAGE_SIZE)), atol=0.01)


def test_strength_1_draws_what_is_drawn_without_a_picture() -> None:
    nothing = dataclasses.replace(SETTINGS, strength=1.0)
    assert torch.allclose(draw(nothing, init_of(LARGE)), draw(nothing, None), atol=0.02)
    half = dataclasses.replace(SETTINGS, strength=0.5)
    assert torch.equal(draw(half, None), draw(nothing, None))  # strength says nothing without a picture


@pytest.mark.parametrize(("size", "kept"), [((90, 50), 48), ((40, 20), 16), ((9, 5), 16), ((48, 48), 48)])
def test_a_picture_is_cropped_to_the_largest_stage_it_fills(size: tuple[int, int], kept: int) -> None:
    made = make_init_image(Image.new("RGB", size, "red"), [(16, 16), (48, 48)])
    assert made.pixels.shape == (kept, kept, 3)
    assert (made.pixels == torch.tensor([255, 0, 0], dtype=torch.uint8)).all()


def test_the_middle_is_what_a_crop_keeps() -> None:
    wide = Image.new("RGB", (48, 16), "white")
    wide.paste("red", (16, 0, 32, 16))
    pixels = make_init_image(wide, [(16, 16)]).pixels
    assert (pixels[:, 2:-2] == torch.tensor([255, 0, 0], dtype=torch.uint8)).all()


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.nan])
def test_an_impossible_strength_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError, match="strength must lie above 0"):
        GenerateSettings(strength=strength)


def test_a_file_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(QueryError, match=r"no image file at 'no\.png'"):
        read_init_image("no.png", [(16, 16)])
