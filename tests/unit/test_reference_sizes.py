"""The large presets: of the sizes that Imagen names, and stages that fit on each other. Nothing is allocated."""

import dataclasses
import json

import pytest
import torch

from index.config import override, to_dict
from index.errors import ConfigError
from radt.bundle import StageInfo
from radt.cascade import Cascade, Stage
from radt.conditioning import Condition, LowResolution, NeighborBatch, TextCondition
from radt.presets import PRESETS, BaseConfig, bottleneck_only, emoji_demo, imagen_64, imagen_256, imagen_1024
from radt.unet.unet import UNet, UNetConfig

SIZES = {"imagen-64": (imagen_64, 2_000e6), "imagen-256": (imagen_256, 600e6), "imagen-1024": (imagen_1024, 400e6)}


def on_paper(config: UNetConfig) -> UNet:
    """The network without its numbers."""
    with torch.device("meta"):
        return UNet(config)


def count(unet: UNet) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet]:
    return {name: on_paper(config()) for name, (config, _) in SIZES.items()}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_is_the_one_named(name: str, unets: dict[str, UNet]) -> None:
    assert count(unets[name]) == pytest.approx(SIZES[name][1], rel=0.03)


@pytest.mark.parametrize("name", SIZES)
def test_more_blocks_at_low_resolution(name: str) -> None:
    blocks = SIZES[name][0]().blocks
    assert blocks[-1] > blocks[0]
    assert name == "imagen-1024" or list(blocks) == sorted(blocks)


def test_the_stages_are_a_cascade(unets: dict[str, UNet]) -> None:
    stages = [Stage(unet=unet, info=StageInfo(name=name)) for name, unet in unets.items()]
    cascade = Cascade(stages, device="meta")
    assert [stage.size for stage in cascade.stages] == [(64, 64), (256, 256), (1024, 1024)]
    with pytest.raises(ConfigError, match="draws over pictures of height and width"):
        Cascade([stages[0], stages[2]])


@pytest.mark.parametrize("name", SIZES)
def test_a_step_runs_with_neighbors(name: str, unets: dict[str, UNet]) -> None:
    """Shapes alone: every layer takes what the one before gives, K = 2, up to 1024x1024."""
    unet, k = unets[name], 2
    height, width = unet.config.size
    with torch.device("meta"):
        batch = NeighborBatch(
            pixels=torch.empty(1, k, 3, height, width), text=text(1, k), mask=torch.ones(1, k, dtype=torch.bool)
        )
        low_res = LowResolution(pixels=torch.empty(1, 3, height, width), level=torch.empty(1))
        asked = Condition(
            text=text(1),
            neighbors=unet.project_neighbors(batch),
            low_res=None if unet.config.low_res is None else low_res,
        )
        x, t = torch.empty(1, 3, height, width), torch.empty(1)
        out = unet(x, t, asked.text, asked.neighbors, low_res=asked.low_res)
    assert out.shape == x.shape
    assert out.is_meta


def text(*lead: int) -> TextCondition:
    return TextCondition(
        tokens=torch.empty(*lead, 128, 4096),
        mask=torch.ones(*lead, 128, dtype=torch.bool),
        pooled=torch.empty(*lead, 4096),
    )


@pytest.mark.parametrize("name", SIZES)
def test_radt_train_knows_them(name: str) -> None:
    preset = PRESETS[name]()
    assert isinstance(preset, BaseConfig)
    assert preset.unet == SIZES[name][0]()
    smaller = override(preset, "unet.channels=[16, 16, 16, 16]", "text_encoder=null")
    assert count(on_paper(smaller.unet)) < 25e6
    assert json.loads(json.dumps(to_dict(smaller)))["text_encoder"] is None


def test_neighbors_at_the_bottleneck_alone_cost_a_tenth_at_most(unets: dict[str, UNet]) -> None:
    """As in the source: one layer, at the coarsest map; about 10 % of the parameters in Instruct-Imagen's 2.51 B."""
    config = bottleneck_only(imagen_64())
    assert config.neighbor_layers == (("encoder", 3),)
    assert bottleneck_only(emoji_demo().unet).neighbor_layers == (("encoder", 2),)
    without = count(on_paper(dataclasses.replace(config, encoder_neighbor_levels=())))
    assert without < count(on_paper(config)) < count(unets["imagen-64"])
    assert count(on_paper(config)) / without < 1.1
