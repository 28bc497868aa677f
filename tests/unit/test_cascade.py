"""The cascade: every stage at its own size over the picture below; the first draws as if it were alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from index.errors import ConfigError
from radt.bundle import StageInfo
from radt.cascade import Cascade, Stage, augment, of_stage, stage_generator
from radt.conditioning import NeighborBatch, take_rows
from radt.diffusion.schedule import NoiseSchedule
from radt.resizing import resize
from radt.settings import GenerateSettings
from radt.unet.unet import UNet
from tests.networks import IMAGE_SIZE, random_neighbors, random_text, random_unet, small_config

LARGE = 3 * IMAGE_SIZE
SETTINGS = GenerateSettings(steps=2, sr_steps=3, sampler="ddim")
SCHEDULE = NoiseSchedule()
SMALL = {"channels": (16, 16), "blocks": (1, 1), "attention_levels": (1,), "fold": 4}
SMALL |= {"encoder_neighbor_levels": (1,), "decoder_neighbor_levels": (0,)}


def stage(number: int, *, seed: int = 0, **changes: Any) -> Stage:
    return Stage(unet=random_unet(seed, **changes).requires_grad_(requires_grad=False), info=info(number))


def info(number: int, **changes: Any) -> StageInfo:
    return StageInfo(name=f"stage{number}", **changes)


FIRST = stage(0)
SECOND = stage(1, seed=1, image_size=LARGE, low_res_size=IMAGE_SIZE, **SMALL)
TWO = Cascade([FIRST, SECOND])


def neighbors_at(size: tuple[int, int], batch: NeighborBatch) -> NeighborBatch:
    pixels = resize(batch.pixels.flatten(0, 1), size).unflatten(0, batch.pixels.shape[:2])
    return dataclasses.replace(batch, pixels=pixels)


def draw(cascade: Cascade, seeds: Sequence[int], *, settings: GenerateSettings = SETTINGS, k: int = 2) -> Tensor:
    text, batch = random_text(1), random_neighbors(1, max(k, 1))
    sizes = [each.size for each in cascade.of(settings)]
    batches = [neighbors_at(size, batch) for size in sizes] if k else None
    conditions = [take_rows(one, [0] * len(seeds)) for one in cascade.condition(text, batches, settings)]
    return cascade.sample(conditions, settings, seeds)


def test_the_last_stage_decides_the_size_and_fewer_stages_draw_smaller() -> None:
    assert draw(TWO, [1, 2]).shape == (2, 3, LARGE, LARGE)
    small = draw(TWO, [1, 2], settings=dataclasses.replace(SETTINGS, stages=1))
    assert torch.equal(small, draw(Cascade([FIRST]), [1, 2]))


def test_a_picture_is_the_same_alone_and_among_others() -> None:
    together = draw(TWO, [5, 6, 7])
    for seed, picture in zip([5, 6, 7], together, strict=True):
        torch.testing.assert_close(draw(TWO, [seed])[0], picture, rtol=0, atol=2e-4)


def test_neighbors_matter_at_the_upper_stage_alone() -> None:
    settings = dataclasses.replace(SETTINGS, stages=None)
    text, batch = random_text(1), random_neighbors(1, 2)
    with_both = TWO.condition(text, [neighbors_at(each.size, batch) for each in TWO.stages], settings)
    base_alone = (with_both[0], with_both[1].without_neighbors())
    one, other = TWO.sample(with_both, settings, [0]), TWO.sample(base_alone, settings, [0])
    assert (one - other).abs().max() > 1e-3


class Copy(UNet):
    """A stage that believes the picture below: its x0 is what it draws over."""

    def __init__(self, size: int, low_res_size: int):
        super().__init__(small_config(image_size=size, low_res_size=low_res_size, **SMALL))
        self.levels: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, text: Any, neighbors: Any = None, *, low_res: Any) -> Tensor:
        self.levels.append(low_res.level)
        return low_res.pixels  # type: ignore[no-any-return]


def test_a_stage_draws_over_the_picture_below_noised_to_the_level_asked_for() -> None:
    copy = Copy(LARGE, IMAGE_SIZE)
    above = Stage(unet=copy, info=info(1, prediction="x0"))
    cascade = Cascade([FIRST, above])
    below = resize(draw(Cascade([FIRST]), [3], k=0), (LARGE, LARGE))
    for level in (0.0, 0.3):
        settings = dataclasses.replace(SETTINGS, augmentation_level=level)
        drawn = draw(cascade, [3], settings=settings, k=0)
        generators = [stage_generator(3, 1)]
        noised = augment(below, level, schedule=SCHEDULE, generators=generators).pixels
        torch.testing.assert_close(drawn, noised.clamp(-1, 1), rtol=0, atol=1e-5)
        assert all(torch.equal(seen, torch.full_like(seen, level)) for seen in copy.levels[-SETTINGS.sr_steps :])
    # Without noise, the picture itself.
    nothing = dataclasses.replace(SETTINGS, augmentation_level=0.0)
    torch.testing.assert_close(draw(cascade, [3], settings=nothing, k=0), below, rtol=0, atol=1e-3)


def test_the_noise_over_the_picture_below_has_the_schedules_size() -> None:
    level, pictures = 0.4, torch.zeros(8, 3, 32, 32)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    noised = augment(pictures, level, schedule=SCHEDULE, generators=generators)
    assert noised.pixels.std() == pytest.approx(SCHEDULE.sigma(level), rel=0.02)
    assert noised.level.tolist() == pytest.approx([level] * 8)


def test_how_the_first_stage_was_sampled_does_not_change_the_noise_of_the_second() -> None:
    """Its own generator: an ancestral sampler below draws more numbers than a deterministic one."""
    assert torch.equal(torch.randn(4, generator=stage_generator(9, 1)), torch.randn(4, generator=stage_generator(9, 1)))
    first = torch.randn(4, generator=torch.Generator().manual_seed(9))
    assert torch.equal(torch.randn(4, generator=stage_generator(9, 0)), first)
    assert not torch.equal(torch.randn(4, generator=stage_generator(9, 1)), first)


def test_three_stages_of_other_ratios_and_a_rectangle() -> None:
    wide = {"image_size": 8, "image_width": 16, **SMALL, "fold": 2}
    stages = [
        stage(0, **wide),
        stage(1, **{**wide, "image_size": 16, "image_width": 32, "low_res_size": 8}),
        stage(2, **{**wide, "image_size": 24, "image_width": 48, "low_res_size": 16}),
    ]
    assert stages[2].unet.config.low_res == (16, 32)
    assert draw(Cascade(stages), [0]).shape == (1, 3, 24, 48)


def test_progress_counts_every_stage() -> None:
    told: list[int] = []
    conditions = [take_rows(one, [0, 0]) for one in TWO.condition(random_text(1), None, SETTINGS)]
    TWO.sample(conditions, SETTINGS, [0, 1], told.append)
    assert told == [2, 4, 6, 8, 10]
    assert TWO.network_steps(SETTINGS) == 5


def test_the_settings_of_a_stage() -> None:
    settings = GenerateSettings(steps=20, text_guidance=3, sr_steps=7, sr_text_guidance=1.5, sr_neighbor_guidance=2)
    assert of_stage(settings, 0) is settings
    above = of_stage(settings, 2)
    assert (above.steps, above.text_guidance, above.neighbor_guidance) == (7, 1.5, 2)


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="'stage0' draws over no picture"):
        Cascade([FIRST, FIRST])
    with pytest.raises(ConfigError, match=r"draws over pictures of height and width \(16, 16\).*are \(48, 48\)"):
        Cascade([FIRST, SECOND, SECOND])
    with pytest.raises(ConfigError, match="stages 3 were asked for and this model has 2"):
        TWO.of(dataclasses.replace(SETTINGS, stages=3))
