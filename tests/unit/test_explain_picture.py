"""Where attention comes from and goes: beside softmax written out, and the sums that tie the maps to the shares."""

import torch
from torch import Tensor

from radt.unet.attention import NeighborAttention, shares_of
from radt.unet.unet import UNet
from tests.networks import TEXT_WIDTH, generator, random_neighbors, random_pixels, random_text, random_unet, randomize

B, K, HEADS, CHANNELS, HEIGHT, WIDTH = 2, 3, 2, 32, 3, 4
TEXT = random_text(B, seed=5)
MASK = torch.tensor([[True, False, True], [True, True, True]])


def new_layer() -> NeighborAttention:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = NeighborAttention(CHANNELS, TEXT_WIDTH, heads=HEADS, key_width=6, value_width=5)
    randomize(layer, scale=0.3)
    return layer.requires_grad_(requires_grad=False)


def slow_regions(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax of the inner products, one head and position at a time: how much lands on position s of neighbour j."""
    landed = torch.zeros(B, K, HEIGHT * WIDTH)
    for b in range(B):
        for g in range(HEADS):
            for query in queries[b, g]:
                logits = [float(query @ key) for key in keys[b, g]]
                raised = torch.tensor(logits, dtype=torch.float64).exp()
                landed[b] += (raised / raised.sum())[:-1].view(K, -1) / (HEADS * queries.shape[2])
    return landed


def test_region_mass_is_softmax_attention_written_out_and_sums_to_the_share() -> None:
    layer = new_layer()
    x = torch.randn(B, CHANNELS, HEIGHT, WIDTH, generator=generator(1))
    keys, _ = layer.project(torch.randn(B, K, CHANNELS, HEIGHT, WIDTH, generator=generator(2)))
    agreement = torch.rand(B, TEXT.mask.shape[1], K, generator=generator(6))
    regions = layer.region_mass(x, keys=keys, mask=MASK, text=TEXT, agreement=agreement)
    expected = slow_regions(layer.queries(x, MASK, TEXT, agreement), keys)
    assert expected[1].amax(dim=1).max() > 2 * expected[1].mean()  # some regions do get more
    torch.testing.assert_close(regions, expected, atol=1e-6, rtol=1e-4)
    shares = layer.mass(x, keys=keys, mask=MASK, text=TEXT, agreement=agreement).mean(dim=1)
    torch.testing.assert_close(regions.sum(dim=-1), shares)
    assert regions[0, 1].max() == 0  # masked


def test_the_size_of_a_chunk_changes_nothing() -> None:
    queries = torch.randn(B, HEADS, 7, 8, generator=generator(1))
    keys = torch.randn(B, HEADS, K * 5 + 1, 8, generator=generator(2))
    whole = torch.cat(list(shares_of(queries, keys, num_neighbors=K)), dim=1)
    parts = list(shares_of(queries, keys, num_neighbors=K, chunk=3))
    assert [part.shape[1] for part in parts] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_the_maps_of_a_network_average_to_the_share_of_each_neighbour() -> None:
    unet: UNet = random_unet().requires_grad_(requires_grad=False)
    neighbors = unet.project_neighbors(random_neighbors(B, 2, seed=3))
    call = random_pixels(B), torch.tensor([0.1, 0.8]), TEXT, neighbors
    maps, shares = unet.attention_maps(*call), unet.attention_mass(*call)
    assert [tuple(each.picture.shape) for each in maps] == [(B, 2, n, n) for n in (4, 2, 4, 8)]
    from_picture = torch.stack([each.picture.mean(dim=(2, 3)) for each in maps]).mean(dim=0)
    torch.testing.assert_close(from_picture, shares)
    torch.testing.assert_close(torch.stack([each.neighbor.sum(dim=(2, 3)) for each in maps]).mean(dim=0), shares)


def test_a_network_without_neighbour_layers_has_no_maps() -> None:
    unet = random_unet(encoder_neighbor_levels=(), decoder_neighbor_levels=())
    assert (
        unet.attention_maps(random_pixels(B), torch.rand(B), TEXT, unet.project_neighbors(random_neighbors(B, 2))) == []
    )
