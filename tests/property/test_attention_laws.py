"""Laws of the network over random conditions: the order of neighbours, and places that hold none, change nothing."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radt.unet.attention import CaptionAgreement
from radt.unet.unet import UNet
from tests.networks import choose, generator, random_neighbors, random_pixels, random_text, random_unet

UNET = random_unet(
    channels=(16, 16), blocks=(1, 1), attention_levels=(1,), encoder_neighbor_levels=(1,), decoder_neighbor_levels=(0,)
).requires_grad_(requires_grad=False)
SEEDS = st.integers(min_value=0, max_value=2**31)
FEW = settings(max_examples=15, deadline=None)


@st.composite
def masked_and_permuted(draw: st.DrawFn) -> tuple[int, torch.Tensor, list[int]]:
    k = draw(st.integers(min_value=1, max_value=6))
    mask = torch.tensor([[draw(st.booleans()) for _ in range(k)] for _ in range(2)])
    return k, mask, draw(st.permutations(range(k)))


@FEW
@given(SEEDS, masked_and_permuted())
def test_the_order_of_neighbors_is_of_no_account(seed: int, drawn: tuple[int, torch.Tensor, list[int]]) -> None:
    k, mask, order = drawn
    x, t, text = random_pixels(2, seed), torch.rand(2, generator=generator(seed)), random_text(2, seed=seed)
    neighbors = random_neighbors(2, k, seed=seed, mask=mask)
    usual = UNET(x, t, text, UNET.project_neighbors(neighbors))
    permuted = UNET(x, t, text, UNET.project_neighbors(choose(neighbors, order)))
    torch.testing.assert_close(usual, permuted, atol=1e-5, rtol=1e-5)


@FEW
@given(SEEDS, masked_and_permuted())
def test_empty_places_are_no_neighbors(seed: int, drawn: tuple[int, torch.Tensor, list[int]]) -> None:
    """Whatever lies in a masked place, and if the place is not there at all."""
    k, mask, _ = drawn
    x, t, text = random_pixels(1, seed), torch.rand(1, generator=generator(seed)), random_text(1, seed=seed)
    neighbors = random_neighbors(1, k, seed=seed, mask=mask[:1])
    kept = [place for place in range(k) if mask[0, place]]
    ragged = UNET(x, t, text, UNET.project_neighbors(neighbors))
    dense = UNET(x, t, text, UNET.project_neighbors(choose(neighbors, kept)) if kept else None)
    torch.testing.assert_close(ragged, dense, atol=1e-5, rtol=1e-5)
    other = dataclasses.replace(neighbors, pixels=torch.where(mask[:1, :, None, None, None], neighbors.pixels, 1.0))
    torch.testing.assert_close(ragged, UNET(x, t, text, UNET.project_neighbors(other)), atol=1e-6, rtol=1e-5)


@FEW
@given(SEEDS, st.integers(min_value=1, max_value=4))
def test_agreement_is_a_cosine_and_a_caption_that_is_the_prompt_agrees_best(seed: int, k: int) -> None:
    agree: CaptionAgreement = UNET.agreement
    prompt, captions = random_text(1, seed=seed), random_text(1, k, seed=seed + 1)
    same = dataclasses.replace(
        captions,
        tokens=torch.cat([captions.tokens, prompt.tokens[:, None]], dim=1),
        mask=torch.cat([captions.mask, prompt.mask[:, None]], dim=1),
        pooled=torch.cat([captions.pooled, prompt.pooled[:, None]], dim=1),
    )
    neighbors = dataclasses.replace(random_neighbors(1, k + 1, seed=seed), text=same)
    found = agree(prompt, UNET.project_neighbors(neighbors))
    assert found.abs().max() <= 1 + 1e-5
    assert (found[..., -1:] >= found - 1e-5).all()
    assert found[~prompt.mask].abs().sum() == 0


def test_the_network_of_these_laws_does_look_at_its_neighbors() -> None:
    unet: UNet = UNET
    x, t, text = random_pixels(2), torch.rand(2, generator=generator()), random_text(2)
    seen = unet(x, t, text, unet.project_neighbors(random_neighbors(2, 2)))
    assert (seen - unet(x, t, text)).abs().max() > 0.05
