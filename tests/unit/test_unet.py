"""The U-Net: without neighbours it is the network without their layers; keys and values are data; nothing is dead."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from index.errors import ConfigError
from radt.conditioning import map_tensors
from radt.unet.attention import NeighborAttention, TextRefinerLayer, TextSelfAttention
from radt.unet.layers import ResidualBlock
from radt.unet.unet import UNet, UNetConfig
from tests.networks import (
    IMAGE_SIZE,
    choose,
    generator,
    new_unet,
    random_neighbors,
    random_pixels,
    random_text,
    random_unet,
    randomize,
    small_config,
)

B, K = 3, 2
X, T, TEXT = random_pixels(B), torch.tensor([0.1, 0.5, 0.9]), random_text(B)
NEIGHBORS = random_neighbors(B, K, seed=3)
NOBODY = dataclasses.replace(NEIGHBORS, mask=torch.zeros(B, K, dtype=torch.bool))


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_unet().requires_grad_(requires_grad=False)


def tensors_of(record: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, record)
    return found


def row_of(record: Any, i: int) -> Any:
    return map_tensors(lambda tensor: tensor[i : i + 1], record)


def assert_bitwise(one: Any, two: Any) -> None:
    for first, second in zip(tensors_of(one), tensors_of(two), strict=True):
        assert torch.equal(first, second)


# K = 0


@pytest.mark.parametrize("side", ["encoder", "decoder", "both"])
def test_no_neighbors_is_the_network_without_neighbor_layers(unet: UNet, side: str) -> None:
    """Bit for bit: with `neighbors` None, and with every neighbour masked too."""
    levels = {"encoder_neighbor_levels": (1, 2), "decoder_neighbor_levels": (0, 1)}
    if side != "both":
        levels[f"{'decoder' if side == 'encoder' else 'encoder'}_neighbor_levels"] = ()
    with_layers = random_unet(seed=1, **levels).requires_grad_(requires_grad=False)
    without = UNet(small_config(encoder_neighbor_levels=(), decoder_neighbor_levels=())).eval()
    shared = {name: w for name, w in with_layers.state_dict().items() if not name.startswith("neighbor_attention.")}
    without.load_state_dict(shared)
    plain = without(X, T, TEXT)
    assert plain.abs().max() > 0.1
    assert torch.equal(with_layers(X, T, TEXT), plain)
    assert torch.equal(with_layers(X, T, TEXT, with_layers.project_neighbors(NOBODY)), plain)
    assert not torch.allclose(with_layers(X, T, TEXT, with_layers.project_neighbors(NEIGHBORS)), plain, atol=1e-3)


def test_rows_without_neighbors_are_untouched_by_those_that_have_some(unet: UNet) -> None:
    mixed = dataclasses.replace(NEIGHBORS, mask=torch.tensor([[True, True], [False, False], [False, True]]))
    out = unet(X, T, TEXT, unet.project_neighbors(mixed))
    plain = unet(X, T, TEXT)
    assert torch.equal(out[1], plain[1])
    assert not torch.allclose(out[0], plain[0], atol=1e-3)
    assert not torch.allclose(out[2], plain[2], atol=1e-3)


# Keys and values are data


def test_keys_and_values_may_be_kept(unet: UNet) -> None:
    """Computed once and read at two times, for two pictures and prompts: bitwise what computing them anew gives."""
    kept = unet.project_neighbors(NEIGHBORS)
    before = map_tensors(torch.clone, kept)
    for seed, t in ((0, 0.9), (1, 0.2)):
        x, text, times = random_pixels(B, seed), random_text(B, seed=seed + 10), torch.full((B,), t)
        cached = unet(x, times, text, kept)
        assert torch.equal(cached, unet(x, times, text, unet.project_neighbors(NEIGHBORS)))
    assert_bitwise(kept, before)
    assert_bitwise(kept, unet.project_neighbors(NEIGHBORS))


def test_neighbors_are_encoded_at_time_zero_with_their_captions(unet: UNet) -> None:
    flat = map_tensors(lambda tensor: tensor.flatten(0, 1), NEIGHBORS.text)
    maps = unet.encode(NEIGHBORS.pixels.flatten(0, 1), torch.zeros(B * K), flat)
    projected = unet.project_neighbors(NEIGHBORS)
    for i, (side, level) in enumerate(unet.config.neighbor_layers):
        keys, values = unet.reader(side, level).project(maps[level].unflatten(0, (B, K)))
        assert torch.equal(projected.keys[i], keys)
        assert torch.equal(projected.values[i], values)
    other = dataclasses.replace(NEIGHBORS, text=random_text(B, K, seed=77))
    assert not torch.allclose(unet.project_neighbors(other).keys[0], projected.keys[0], atol=1e-3)


def test_ragged_k(unet: UNet) -> None:
    """Three neighbours of which one is masked are two neighbours, whichever it is."""
    three = random_neighbors(B, 3, seed=5)
    for masked in range(3):
        others = [place for place in range(3) if place != masked]
        mask = torch.ones(B, 3, dtype=torch.bool)
        mask[:, masked] = False
        ragged = unet(X, T, TEXT, unet.project_neighbors(dataclasses.replace(three, mask=mask)))
        torch.testing.assert_close(
            ragged, unet(X, T, TEXT, unet.project_neighbors(choose(three, others))), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("k", range(1, 9))
def test_one_network_takes_any_k(unet: UNet, k: int) -> None:
    neighbors = random_neighbors(1, k, seed=k)
    x, t, text = X[:1], T[:1], row_of(TEXT, 0)
    out = unet(x, t, text, unet.project_neighbors(neighbors))
    assert out.shape == x.shape
    fewer = unet(x, t, text, unet.project_neighbors(choose(neighbors, list(range(k - 1)))) if k > 1 else None)
    assert not torch.allclose(out, fewer, atol=1e-4)  # and the last one counts


# Examples do not see each other


def test_image_of_eight_is_the_image_alone(unet: UNet) -> None:
    x, t, text = random_pixels(8), torch.linspace(0, 1, 8), random_text(8, seed=2)
    mask = torch.rand(8, 3, generator=generator(1)) < 0.7
    neighbors = random_neighbors(8, 3, seed=4, mask=mask)
    together = unet(x, t, text, unet.project_neighbors(neighbors))
    for i in range(8):
        kept = unet.project_neighbors(row_of(neighbors, i))
        alone = unet(x[i : i + 1], t[i : i + 1], row_of(text, i), kept)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_one_image_a_call_is_bitwise_repeatable(unet: UNet) -> None:
    text, neighbors = row_of(TEXT, 1), row_of(NEIGHBORS, 1)
    first = unet(X[1:2], T[1:2], text, unet.project_neighbors(neighbors))
    unet(X, T, TEXT, unet.project_neighbors(NEIGHBORS))  # others in between
    assert torch.equal(unet(X[1:2], T[1:2], text, unet.project_neighbors(neighbors)), first)


def test_dropped_text_is_the_same_null_for_every_prompt(unet: UNet) -> None:
    everywhere = torch.ones(B, dtype=torch.bool)
    kept = unet.project_neighbors(NEIGHBORS)
    one, two = (unet(X, T, random_text(B, seed=seed).drop(everywhere), kept) for seed in (1, 2))
    assert torch.equal(one, two)
    assert not torch.allclose(unet(X, T, TEXT, kept), one, atol=1e-3)


def test_time_and_pooled_text_matter(unet: UNet) -> None:
    plain = unet(X, T, TEXT)
    assert not torch.allclose(unet(X, T.flip(0), TEXT), plain, atol=1e-3)
    pooled = dataclasses.replace(TEXT, pooled=TEXT.pooled.flip(0))
    assert not torch.allclose(unet(X, T, pooled), plain, atol=1e-3)


# How a network starts


def test_a_new_network_answers_zero() -> None:
    unet = new_unet()
    assert not unet(X, T, TEXT).any()
    assert not unet(X, T, TEXT, unet.project_neighbors(NEIGHBORS)).any()


def test_every_branch_starts_as_the_identity() -> None:
    unet = new_unet()
    seen: set[type] = set()

    def check(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        seen.add(type(module))
        x = args[0]
        expected = module.path(x) if isinstance(module, ResidualBlock) else x
        assert torch.equal(out, expected)

    for module in unet.modules():
        if isinstance(module, ResidualBlock | TextSelfAttention | NeighborAttention | TextRefinerLayer):
            module.register_forward_hook(check, with_kwargs=True)
    unet(X, T, TEXT, unet.project_neighbors(NEIGHBORS))
    assert seen == {ResidualBlock, TextSelfAttention, NeighborAttention, TextRefinerLayer}


def test_no_parameter_is_dead() -> None:
    """What starts at zero lets the gradient through one layer a step: the output first, then the last convolution of
    every branch, then the rest, the text refiner last. After four steps every single parameter has a gradient."""
    unet = new_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    target = random_pixels(B, seed=9)
    text = TEXT.drop(torch.tensor([False, False, True]))  # so that the null vector is in use

    def silent() -> set[str]:
        optimizer.zero_grad()
        out = unet(X, T, text, unet.project_neighbors(NEIGHBORS))
        (out - target).square().mean().backward()
        return {name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}

    everything = {name for name, _ in unet.named_parameters()}
    counts = []
    for _ in range(5):
        counts.append(silent())
        assert all(parameter.grad is not None for parameter in unet.parameters())  # what several processes need
        optimizer.step()
    assert everything - counts[0] == {"conv_out.weight", "conv_out.bias"}
    assert {"norm_out.weight", "encoder.0.blocks.0.conv2.weight"}.isdisjoint(counts[1])
    assert {name for name in counts[1] if name.endswith("project_out.weight")} == {
        "refiner.layers.0.project_out.weight"
    }
    assert {name.partition(".")[0] for name in counts[3]} <= {"refiner"}
    assert counts[4] == set()


# Configuration


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": (1, 1)}, "blocks (1, 1) needs one entry a level"),
        ({"attention_levels": (3,)}, "attention_levels names level 3, but there are levels 0 to 2"),
        ({"encoder_neighbor_levels": (0, 5)}, "encoder_neighbor_levels names level 5"),
        ({"decoder_neighbor_levels": (-1,)}, "decoder_neighbor_levels names level -1"),
        ({"image_size": 20}, "image_size 20 must be a multiple of 8"),
        ({"text_layers": -1}, "text_layers must be 0 (tokens as they are) or more, got -1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(**changes)
    assert said in str(caught.value)


def test_neighbor_layers_are_in_the_order_they_run() -> None:
    config = small_config(encoder_neighbor_levels=(2, 0), decoder_neighbor_levels=(0, 1))
    assert config.neighbor_layers == (("encoder", 0), ("encoder", 2), ("decoder", 1), ("decoder", 0))


@pytest.mark.parametrize(
    "config",
    [
        small_config(
            channels=(16,), blocks=(1,), attention_levels=(), encoder_neighbor_levels=(0,), decoder_neighbor_levels=()
        ),
        # the source's form
        small_config(fold=1, encoder_neighbor_levels=(2,), decoder_neighbor_levels=(), text_layers=0),
        small_config(channels=(24, 40), blocks=(2, 1), attention_levels=(0, 1), encoder_neighbor_levels=(0, 1)),
    ],
)
def test_other_forms_run(config: UNetConfig) -> None:
    unet = UNet(config)
    out = unet(X, T, TEXT, unet.project_neighbors(NEIGHBORS))
    assert out.shape == (B, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_new_refiner_changes_nothing_and_a_trained_one_does() -> None:
    plain, refined = random_unet(text_layers=0), new_unet(text_layers=2)
    refined.load_state_dict(refined.state_dict() | plain.state_dict())
    kept = plain.project_neighbors(NEIGHBORS)
    assert_bitwise(refined.project_neighbors(NEIGHBORS), kept)
    assert torch.equal(refined(X, T, TEXT, kept), plain(X, T, TEXT, kept))
    randomize(refined.refiner)
    assert not torch.allclose(refined(X, T, TEXT, kept), plain(X, T, TEXT, kept), atol=1e-3)


def test_prompt_and_captions_are_compared_by_the_tokens_as_they_came() -> None:
    """A refiner must not move a word of the prompt away from the same word of a caption."""
    unet = random_unet(text_layers=2)
    captions = unet.encode_pairs(NEIGHBORS).captions
    assert torch.equal(captions, unet.agreement.embed(NEIGHBORS.text.tokens))


def test_attention_mass_is_a_share_for_each_neighbor(unet: UNet) -> None:
    shares = unet.attention_mass(X, T, TEXT, unet.project_neighbors(NEIGHBORS))
    assert shares.shape == (B, K)
    assert (shares > 0).all()
    assert (shares.sum(dim=1) <= 1 + 1e-6).all()
    swapped = unet.attention_mass(X, T, TEXT, unet.project_neighbors(choose(NEIGHBORS, [1, 0])))
    torch.testing.assert_close(swapped, shares.flip(1))


def test_attention_mass_of_a_neighbor_that_is_not_there_is_zero(unet: UNet) -> None:
    mask = torch.tensor([[True, False]] * B)
    shares = unet.attention_mass(X, T, TEXT, unet.project_neighbors(dataclasses.replace(NEIGHBORS, mask=mask)))
    assert (shares[:, 1] == 0).all()
    assert (shares[:, 0] > 0).all()
    assert (unet.attention_mass(X, T, TEXT, unet.project_neighbors(NOBODY)) == 0).all()
    without = random_unet(encoder_neighbor_levels=(), decoder_neighbor_levels=())
    assert (without.attention_mass(X, T, TEXT, without.project_neighbors(NEIGHBORS)) == 0).all()


def test_the_neighbor_whose_caption_is_the_prompt_gets_more_attention() -> None:
    unet = new_unet().eval()  # as training starts: captions compared by one shared projection
    caption = dataclasses.replace(
        random_text(1, 2, seed=8),
        tokens=torch.stack([TEXT.tokens[:1], torch.randn(1, *TEXT.tokens.shape[1:], generator=generator(9))], dim=1),
        mask=torch.stack([TEXT.mask[:1]] * 2, dim=1),
    )
    picture = random_pixels(1, seed=5)[:, None].expand(-1, 2, -1, -1, -1)
    batch = dataclasses.replace(random_neighbors(1, 2), pixels=picture, text=caption)
    text = map_tensors(lambda tensor: tensor[:1], TEXT)
    with torch.inference_mode():
        right, wrong = unet.attention_mass(X[:1], T[:1], text, unet.project_neighbors(batch))[0].tolist()
    assert right > 2 * wrong
