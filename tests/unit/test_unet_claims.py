"""What the Efficient U-Net claims (rows I11, R8): where it halves and doubles, what it adds, and what that saves."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from index.config import from_dict, to_dict
from radt.bundle import default_bundle, load_unet
from radt.presets import bottleneck_only, emoji_demo
from radt.unet.attention import TextSelfAttention
from radt.unet.layers import ResidualBlock
from radt.unet.unet import UNet, UNetConfig
from tests.networks import (
    IMAGE_SIZE,
    new_unet,
    random_neighbors,
    random_pixels,
    random_text,
    random_unet,
    randomize,
    small_config,
)

B, K = 2, 2
X, T, TEXT = random_pixels(B), torch.tensor([0.2, 0.8]), random_text(B)
NEIGHBORS = random_neighbors(B, K, seed=3)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_unet().requires_grad_(requires_grad=False)


def calls(unet: nn.Module, kinds: tuple[type, ...], *args: Any) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Every call of modules of these kinds in the order they ran: (name, module, input, output)."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, given, out, name=name: seen.append((name, m, given[0], out)))
        for name, module in unet.named_modules()
        if isinstance(module, kinds)
    ]
    unet(*args)
    for hook in hooks:
        hook.remove()
    return seen


# Order


def test_a_down_block_halves_first_and_an_up_block_doubles_last(unet: UNet) -> None:
    """The first convolution of every encoder level below the first has stride 2; the doubling ends its decoder level.
    So all residual blocks of a level, on both sides, run at the level's own size, the smallest it ever has."""
    convolutions = calls(unet, (nn.Conv2d,), X, T, TEXT)
    for level in (1, 2):
        down = [(m, x, out) for name, m, x, out in convolutions if name.startswith(f"encoder.{level}.")]
        assert down[0][0].stride == (2, 2)
        assert all(m.stride == (1, 1) for m, _, _ in down[1:])
        up = [(m, x, out) for name, m, x, out in convolutions if name.startswith(f"decoder.{level}.")]
        assert up[-1][1].shape[-1] == 2 * up[0][1].shape[-1]
        assert {x.shape[-1] for _, x, _ in up[:-1]} == {IMAGE_SIZE // unet.config.fold // 2**level}
    for name, _, x, _ in calls(unet, (ResidualBlock,), X, T, TEXT):
        assert x.shape[-1] == IMAGE_SIZE // unet.config.fold // 2 ** int(name.split(".")[1])


def test_the_residual_block_is_norm_swish_convolution_twice_beside_a_path() -> None:
    block = ResidualBlock(16, 32, 6)
    randomize(block)
    x = torch.randn(1, 16, 4, 4)
    ran = calls(block, (nn.GroupNorm, nn.Conv2d), x, torch.zeros(1, 6))
    assert [name for name, *_ in ran] == ["norm1", "conv1", "norm2", "conv2", "path"]
    assert torch.equal(ran[1][2], nn.functional.silu(ran[0][3]))
    assert ran[4][1].kernel_size == (1, 1)
    assert torch.equal(ran[4][2], x)


# Skips


def test_skips_arrive_divided_by_the_root_of_two(unet: UNet) -> None:
    maps = unet.encode(X, T, TEXT)
    merges = [(name, x) for name, _, x, _ in calls(unet, (ResidualBlock,), X, T, TEXT) if name.endswith("merge")]
    assert [name for name, _ in merges] == ["decoder.2.merge", "decoder.1.merge", "decoder.0.merge"]
    for level, (_, x) in zip((2, 1, 0), merges, strict=True):
        skip = x[:, unet.config.channels[level] :]
        assert torch.equal(skip, maps[level] * 2**-0.5)


# Text


def test_one_softmax_covers_positions_and_words() -> None:
    """Text keys and values stand beside the picture's own: words that outweigh everything leave it nothing."""
    layer = TextSelfAttention(16, 12, heads=2)
    randomize(layer, scale=0.5)
    x, text = torch.randn(1, 16, 2, 2), random_text(1)
    silent = dataclasses.replace(text, mask=torch.zeros_like(text.mask))
    assert not torch.allclose(layer(x, text), layer(x, silent), atol=1e-3)
    with torch.no_grad():
        layer.to_qkv.weight[16:32] = 0  # the picture's keys, so that each of the 4 positions has the logit 0 ...
        layer.text_to_kv.weight[:16] = 0  # ... and so has each word
        value = layer.to_qkv(layer.norm(x))[:, 32:].flatten(2).sum(dim=2)
        words = layer.text_to_kv(layer.text_norm(text.tokens))[:, :, 16:].sum(dim=1)
        mean = (value + words) / (4 + text.mask.shape[1])
        torch.testing.assert_close(layer(x, text), x + layer.project_out(mean[:, :, None, None].expand(x.shape)))


# What the order saves


@pytest.fixture(scope="module")
def plain_order() -> Any:
    return runpy.run_path(str(Path(__file__).parents[2] / "tools" / "plain_order.py"))["PlainOrder"]


def multiply_adds(unet: UNet) -> int:
    with FlopCounterMode(display=False) as counter:
        unet(X, T, TEXT)
    return counter.get_total_flops() // 2


def test_the_usual_order_costs_more_at_equal_parameters(unet: UNet, plain_order: Any) -> None:
    """A twin with the same weights under the same names, whose blocks run before the halving and after the doubling."""
    twin = plain_order(unet.config).eval()
    twin.load_state_dict(unet.state_dict())
    assert twin(X, T, TEXT).shape == X.shape
    assert multiply_adds(twin) > 1.9 * multiply_adds(unet)
    one_level = {"channels": (16,), "blocks": (1,), "attention_levels": ()}
    one_level |= {"encoder_neighbor_levels": (), "decoder_neighbor_levels": ()}
    ours = random_unet(**one_level)
    same = plain_order(ours.config).eval()
    same.load_state_dict(ours.state_dict())
    torch.testing.assert_close(same(X, T, TEXT), ours(X, T, TEXT))  # where there is nothing to halve


# Where neighbours are read, and who encodes them (R8)


@pytest.mark.parametrize("levels", [{"encoder": (2,)}, {"decoder": (0,)}, {"encoder": (0, 1), "decoder": (2, 1)}])
def test_neighbors_are_read_at_the_levels_chosen_and_at_no_other(levels: dict[str, tuple[int, ...]]) -> None:
    chosen = {f"{side}_neighbor_levels": levels.get(side, ()) for side in ("encoder", "decoder")}
    unet = random_unet(**chosen).requires_grad_(requires_grad=False)
    assert set(unet.neighbor_attention) == {f"{side}{level}" for side, some in levels.items() for level in some}
    kept = unet.project_neighbors(NEIGHBORS)
    assert len(kept.keys) == len(unet.config.neighbor_layers)
    assert not torch.allclose(unet(X, T, TEXT, kept), unet(X, T, TEXT), atol=1e-3)


def test_the_source_reads_them_at_the_bottleneck_alone() -> None:
    config = bottleneck_only(emoji_demo().unet)
    assert config.neighbor_layers == (("encoder", len(config.channels) - 1),)
    assert bottleneck_only(config) == config


def test_an_encoder_of_their_own_with_the_same_weights_changes_nothing(unet: UNet) -> None:
    """Bit for bit the shared form, until its weights move; and then the network without neighbours stays as it was."""
    separate = random_unet(neighbor_encoder="separate").requires_grad_(requires_grad=False)
    state = unet.state_dict()
    own = {f"neighbor_{name}": w for name, w in state.items() if name.startswith(("encoder.", "embedding."))}
    wanted = separate.state_dict()
    separate.load_state_dict(state | {name: w for name, w in own.items() if name in wanted})
    shared = unet(X, T, TEXT, unet.project_neighbors(NEIGHBORS))
    assert torch.equal(separate(X, T, TEXT, separate.project_neighbors(NEIGHBORS)), shared)
    randomize(separate.neighbor_encoder, seed=1)
    assert torch.equal(separate(X, T, TEXT), unet(X, T, TEXT))
    assert not torch.allclose(separate(X, T, TEXT, separate.project_neighbors(NEIGHBORS)), shared, atol=1e-3)


def test_an_encoder_of_their_own_ends_where_nothing_more_is_read() -> None:
    """Every level of it is in use, so that every process of a training run has a gradient for all of it."""
    separate = new_unet(neighbor_encoder="separate", encoder_neighbor_levels=(1,), decoder_neighbor_levels=(0,))
    assert len(separate.neighbor_encoder) == 2
    randomize(separate)
    separate(X, T, TEXT, separate.project_neighbors(NEIGHBORS)).sum().backward()
    assert all(parameter.grad is not None for parameter in separate.parameters())
    nobody = new_unet(neighbor_encoder="separate", encoder_neighbor_levels=(), decoder_neighbor_levels=())
    assert not hasattr(nobody, "neighbor_encoder")


def test_a_super_resolution_stage_may_have_one_too() -> None:
    unet = new_unet(neighbor_encoder="separate", low_res_size=8)
    assert unet.project_neighbors(NEIGHBORS).mask.shape == (B, K)
    assert hasattr(unet.neighbor_embedding, "augmentation")


def test_configurations_and_weights_written_before_are_shared() -> None:
    values = {name: value for name, value in to_dict(small_config()).items() if name != "neighbor_encoder"}
    assert from_dict(UNetConfig, values) == small_config()
    assert load_unet(default_bundle() / "stage0").config.neighbor_encoder == "shared"
