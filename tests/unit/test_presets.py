"""Presets: whole configurations that survive JSON, fit together, and change one field at a time."""

import json
from dataclasses import replace
from typing import Any

import pytest

from index.config import from_dict, override, to_dict
from index.errors import ConfigError
from radt.presets import PRESETS, BaseConfig, emoji_demo, tiny
from radt.training.clip import ClipTrainConfig
from radt.training.distill_run import DistillConfig
from radt.training.emoji_pack import PackConfig
from radt.training.recognizer import RecognizerTrainConfig
from radt.unet.unet import UNet

BASE = {"emoji-demo": emoji_demo, "tiny": tiny}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = PRESETS[name]()
    assert isinstance(config, BaseConfig | DistillConfig | ClipTrainConfig | RecognizerTrainConfig)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", BASE)
def test_a_preset_fits_together(name: str) -> None:
    config = BASE[name]()
    assert config.data.candidates <= config.pack.candidates
    assert config.loop.num_steps * (1 - config.optim.cooldown_share) > config.optim.warmup_steps
    clip = PRESETS["clip-emoji"]()
    assert isinstance(clip, ClipTrainConfig)
    assert (config.unet.text_width, config.unet.pooled_width) == (clip.width, clip.embed_dim)
    assert config.sampling.k >= 1
    names = {"eps", "x0", "v"}
    assert config.prediction in names


def test_the_demonstration_fits_the_package() -> None:
    """5 M parameters are 10 MiB in half precision, of at most 30 MiB with the text encoder."""
    parameters = sum(parameter.numel() for parameter in UNet(emoji_demo().unet).parameters())
    assert 4e6 < parameters < 6e6
    assert sum(parameter.numel() for parameter in UNet(tiny().unet).parameters()) < 2e5


def test_one_field_changes() -> None:
    config = override(emoji_demo(), "data.wrong_prob=0.5")
    assert config == replace(emoji_demo(), data=replace(emoji_demo().data, wrong_prob=0.5))
    deeper = override(tiny(), "unet.channels=[16, 32, 32]", "unet.blocks=[1, 1, 1]")  # neither fits alone
    assert (deeper.unet.channels, deeper.unet.blocks) == ((16, 32, 32), (1, 1, 1))
    assert override(tiny(), "pack.num_entities=5").pack.num_entities == 5
    assert override(tiny(), "unet.encoder_neighbor_levels=[]").unet.encoder_neighbor_levels == ()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("data.wrong_probability=1", "did you mean 'wrong_prob'"),
        ("loop.num_steps=0", "num_steps must be at least 1"),
        ("loop.precision=fp16", "expected one of no, bf16"),
        ("prediction=noise", "expected one of eps, x0, v"),
        ("pack.num_entities=1", "num_entities must be at least 2"),
        ("augmentation=1.5", "augmentation is a time from 0 to 1, got 1.5"),
        ("warp=-1", "warp is in pixels and 0 or more, got -1.0"),
        ("time_shift=0", "time_shift must be above 0"),
    ],
)
def test_a_mistake_is_one_sentence(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(tiny(), assignment)
    assert said in str(caught.value)


@pytest.mark.parametrize("changes", [{"num_scenes": 0}, {"candidates": 0}, {"num_entities": 1}, {"kinds": {}}])
def test_impossible_packs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PackConfig(**changes)
