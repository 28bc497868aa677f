"""The model inside the package draws over the pictures of its first stage and keeps what they show."""

import dataclasses

import pytest
import torch

from radt.bundle import default_bundle, read_info
from radt.cascade import augment, of_stage, sample_stage, stage_generator
from radt.corpora.emoji import GlyphRenderer, load_entities
from radt.corpora.scenes import render_scene
from radt.evaluation.emoji_draw import plan_tasks
from radt.neighbors import to_pixels
from radt.pipeline import TextToImage
from radt.resizing import resize


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage.load(device="cpu")


def test_it_has_two_stages_and_fits_in_40_mib() -> None:
    folder = default_bundle()
    assert len(read_info(folder).stages) == 2
    weights = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert max(weights) <= 16 * 2**20
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.0, None])
def test_colours_do_not_shift_where_the_picture_is_drawn_larger(model: TextToImage, level: float | None) -> None:
    """imagen-pytorch's users saw them shift (lucidrains/imagen-pytorch#72). `level` None: as the model has it."""
    settings = model.settings()
    if level is not None:
        settings = dataclasses.replace(settings, augmentation_level=level)
    stage, small = model.cascade.stages[1], model.cascade.stages[0].size
    glyphs = GlyphRenderer()
    tasks = plan_tasks([entity for entity in load_entities() if glyphs.draws(entity)], n=8, seed=1)
    scenes = [to_pixels(torch.from_numpy(render_scene(task.scene, glyphs, stage.size[0]))) for task in tasks]
    over = resize(resize(torch.stack(scenes), small), stage.size)
    generators = [stage_generator(task.seed, 1) for task in tasks]
    with torch.inference_mode():
        condition = model.encode_many([task.prompt for task in tasks], [[] for _ in tasks], settings=settings)[1]
        low_res = augment(over, settings.augmentation_level, schedule=stage.info.schedule, generators=generators)
        condition = dataclasses.replace(condition, low_res=low_res)
        drawn = sample_stage(stage, condition, of_stage(settings, 1), generators=generators)
    shift = (drawn - over).mean(dim=(2, 3)).abs() * 127.5  # in levels of 255, of every channel of every picture
    corner = (drawn - over)[:, :, :12, :12].mean(dim=(2, 3)).abs() * 127.5  # the ground alone
    assert shift.max() < 4, shift
    assert corner.max() < 4, corner
