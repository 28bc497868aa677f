"""Sheets drawn while training: for a few scenes of the pack, neighbours, truth, and drawings with and without them.

A super-resolution stage is shown the truth, shrunk, as the picture below.
"""

import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from index.atomic import write_bytes
from radt.cascade import augment
from radt.conditioning import Condition, LowResolution
from radt.diffusion.denoiser import Denoiser
from radt.diffusion.samplers import SAMPLERS
from radt.neighbors import from_pixels
from radt.resizing import resize
from radt.training.data import draw_batch
from radt.training.loop import step_generator
from radt.training.pack import Pack
from radt.unet.unet import UNet

if TYPE_CHECKING:
    from radt.presets import BaseConfig

ROWS = 12
STEPS = 10


@torch.inference_mode()
def draw_samples(unet: UNet, pack: Pack, config: "BaseConfig", path: Path) -> None:
    """Write one PNG: a row a scene; columns are its neighbours, the truth, drawn with and drawn without neighbours."""
    clean = dataclasses.replace(
        config.data, batch_size=ROWS, wrong_prob=0.0, missing_prob=0.0, drop_text_prob=0.0, drop_neighbors_prob=0.0
    )
    batch = draw_batch(pack, clean, step_generator(config.loop.seed, 0, rank=-1, device=pack.layers.device))
    unet = unet.to(pack.layers.device)
    neighbors, low_res = unet.project_neighbors(batch.neighbors), _low_res(unet, batch.x0, config)
    with_neighbors = _sample(unet, Condition(text=batch.text, neighbors=neighbors, low_res=low_res), config, batch.x0)
    without = _sample(unet, Condition(text=batch.text, low_res=low_res), config, batch.x0)
    columns = [*batch.neighbors.pixels.unbind(dim=1), batch.x0, with_neighbors, without]
    if unet.config.low_res is not None:
        columns.append(resize(resize(batch.x0, unet.config.low_res), unet.config.size))
    sheet = rearrange(torch.stack([from_pixels(column) for column in columns]), "n b h w c -> (b h) (n w) c")
    picture = Image.fromarray(np.ascontiguousarray(sheet.numpy()))
    file = io.BytesIO()
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(file, "PNG")
    write_bytes(path, file.getvalue())


def _low_res(unet: UNet, x0: Tensor, config: "BaseConfig") -> LowResolution | None:
    if unet.config.low_res is None:
        return None
    small = resize(resize(x0, unet.config.low_res), unet.config.size)
    generators = [torch.Generator().manual_seed(i) for i in range(len(x0))]
    return augment(small, config.sampling.augmentation_level, schedule=config.schedule, generators=generators)


def _sample(unet: UNet, condition: Condition, config: "BaseConfig", like: Tensor) -> Tensor:
    denoiser = Denoiser(unet, schedule=config.schedule, prediction=config.prediction)
    generators = [torch.Generator().manual_seed(i) for i in range(len(like))]
    noise = torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators]).to(like.device)

    def denoise(x: Tensor, t: float, step: int) -> Tensor:
        return denoiser(x, t, condition).clamp(-1, 1)

    times = config.schedule.time_steps(STEPS)
    return SAMPLERS["ddim"](denoise, noise, times, schedule=config.schedule, generators=generators)
