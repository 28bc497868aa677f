"""Both attentions and the captions' agreement beside slow twins: the docstrings' formulas, position by position."""

import math

import pytest
import torch
from torch import Tensor

from radt.conditioning import NeighborKV, TextCondition
from radt.unet.attention import (
    NUM_POSITION_WAVES,
    CaptionAgreement,
    NeighborAttention,
    TextRefiner,
    TextRefinerLayer,
    TextSelfAttention,
    cell_centres,
    position_code,
)
from tests.networks import TEXT_WIDTH, generator, new_unet, random_text, randomize

CHANNELS, HEIGHT, WIDTH, B, K = 32, 3, 4, 2, 3
HEADS, KEY, VALUE = 2, 6, 5


def random_map(*lead: int, seed: int) -> Tensor:
    return torch.randn(*lead, CHANNELS, HEIGHT, WIDTH, generator=generator(seed))


@pytest.fixture(scope="module")
def layer() -> NeighborAttention:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = NeighborAttention(CHANNELS, TEXT_WIDTH, heads=HEADS, key_width=KEY, value_width=VALUE)
    randomize(layer, scale=0.3)
    return layer.requires_grad_(requires_grad=False)


MASK = torch.tensor([[True, False, True], [True, True, True]])
TEXT = random_text(B, seed=5)
AGREEMENT = torch.rand(B, TEXT.mask.shape[1], K, generator=generator(6)) * 2 - 1
AGREEMENT = AGREEMENT * TEXT.mask[..., None]


def slow_logits(
    layer: NeighborAttention, x: Tensor, maps: Tensor, *, b: int, g: int, i: int, text: TextCondition, agreement: Tensor
) -> Tensor:
    """q_i . k_js / sqrt(e) + gain kernel(p_i + offset_i - p_s) + beta sum_n a_in agreement_nj, for every (j, s)."""
    h = layer.norm(x)[b].flatten(1).T[i]
    block = slice(g * KEY, (g + 1) * KEY)
    q = layer.to_query.weight[block, :, 0, 0] @ h
    offset = layer.to_offset.weight[2 * g : 2 * g + 2, :, 0, 0] @ h + layer.to_offset.bias[2 * g : 2 * g + 2]
    words = torch.stack([
        (layer.to_word_query.weight[:, :, 0, 0] @ h) @ (layer.word_key.weight @ word)
        for word in text.tokens[b][text.mask[b]]
    ])
    about = words.softmax(dim=0)
    logits = torch.zeros(maps.shape[1], HEIGHT * WIDTH)
    for j, neighbor in enumerate(layer.neighbor_norm(maps[b])):
        trust = layer.agreement_gain[g] * (about @ agreement[b, text.mask[b], j])
        for s in range(HEIGHT * WIDTH):
            key = layer.to_key.weight[block, :, 0, 0] @ neighbor.flatten(1)[:, s]
            row = i // WIDTH + offset[0] - s // WIDTH
            column = i % WIDTH + offset[1] - s % WIDTH
            waves = [math.pi * 2 ** (-n / 2) for n in range(NUM_POSITION_WAVES // 2)]
            kernel = sum(torch.cos(w * row) + torch.cos(w * column) for w in waves) / NUM_POSITION_WAVES
            logits[j, s] = q @ key / math.sqrt(KEY) + layer.position_gain[g] * kernel + trust
    return logits


def slow_attention(layer: NeighborAttention, x: Tensor, maps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output, and each unmasked neighbour's share of every position's attention."""
    out, shares = x.clone(), torch.zeros(len(x), HEIGHT * WIDTH, maps.shape[1])
    for b in range(len(x)):
        for i in range(HEIGHT * WIDTH):
            attended = []
            for g in range(HEADS):
                logits = slow_logits(layer, x, maps, b=b, g=g, i=i, text=TEXT, agreement=AGREEMENT)[mask[b]]
                weights = torch.cat([logits.flatten(), layer.sink[g : g + 1]]).softmax(dim=0)[:-1]
                value_weight = layer.to_value.weight[g * VALUE : (g + 1) * VALUE, :, 0, 0]
                values = layer.neighbor_norm(maps[b])[mask[b]].flatten(2)
                attended.append(torch.einsum("ec,jcs,js->e", value_weight, values, weights.view(logits.shape)))
                shares[b, i, mask[b]] += weights.view(logits.shape).sum(dim=1) / HEADS
            out[b, :, i // WIDTH, i % WIDTH] += layer.project_out.weight[:, :, 0, 0] @ torch.cat(attended)
    return out, shares


def run(layer: NeighborAttention, x: Tensor, maps: Tensor, mask: Tensor = MASK) -> Tensor:
    keys, values = layer.project(maps)
    return layer(x, keys=keys, values=values, mask=mask, text=TEXT, agreement=AGREEMENT)


def test_neighbor_attention_is_its_formula(layer: NeighborAttention) -> None:
    x, maps = random_map(B, seed=1), random_map(B, K, seed=2)
    expected, expected_shares = slow_attention(layer, x, maps, MASK)
    assert (expected - x).abs().max() > 0.1  # the formula does something here
    torch.testing.assert_close(run(layer, x, maps), expected, atol=1e-5, rtol=1e-5)
    keys, _ = layer.project(maps)
    shares = layer.mass(x, keys=keys, mask=MASK, text=TEXT, agreement=AGREEMENT)
    torch.testing.assert_close(shares, expected_shares, atol=1e-5, rtol=1e-5)
    assert shares.sum(dim=-1).max() < 1  # the rest is the sink's
    assert shares[0, :, 1].max() == 0  # masked


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_any_number_of_neighbors_fits_one_layer(layer: NeighborAttention, k: int) -> None:
    """Neighbours that are copies of one another, all trusted alike, attend as one whose logits are log(k) higher."""
    x, one = random_map(B, seed=1), random_map(B, 1, seed=2)
    agreement = torch.zeros(B, TEXT.mask.shape[1], k)
    everyone = torch.ones(B, k, dtype=torch.bool)
    keys, values = layer.project(one.expand(B, k, CHANNELS, HEIGHT, WIDTH))
    many = layer(x, keys=keys, values=values, mask=everyone, text=TEXT, agreement=agreement)
    sink = layer.sink.clone()
    layer.sink -= math.log(k)
    keys, values = layer.project(one)
    once = layer(x, keys=keys, values=values, mask=everyone[:, :1], text=TEXT, agreement=agreement[..., :1])
    layer.sink.copy_(sink)
    torch.testing.assert_close(many, once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_neighbors_add_exactly_nothing(layer: NeighborAttention, dtype: torch.dtype) -> None:
    """However strongly their content calls: the attended value is 0, so what project_out holds does not matter."""
    x, maps = random_map(B, seed=1), 10 * random_map(B, K, seed=2)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out = run(layer, x, maps, torch.zeros_like(MASK))
    assert torch.equal(out.float(), x)


def test_a_masked_neighbor_is_not_looked_at(layer: NeighborAttention) -> None:
    x, maps = random_map(B, seed=1), random_map(B, K, seed=2)
    other = maps.clone()
    other[0, 1] = random_map(seed=9)
    assert torch.equal(run(layer, x, maps), run(layer, x, other))
    other[0, 2] = random_map(seed=9)
    assert not torch.equal(run(layer, x, maps)[0], run(layer, x, other)[0])


def test_a_new_layer_looks_at_the_same_place() -> None:
    """With equal maps the greatest logit of every position and head is its own place, content and all."""
    unet = new_unet(neighbor_key_width=28)
    for reader, channels, side in ((unet.reader("encoder", 2), 32, 4), (unet.reader("decoder", 0), 16, 8)):
        x = torch.randn(2, channels, side, side, generator=generator(4))
        keys, _ = reader.project(x[:, None])
        nothing_said = torch.zeros(2, TEXT.mask.shape[1], 1)
        with torch.no_grad():
            queries = reader.queries(x, torch.ones(2, 1, dtype=torch.bool), TEXT, nothing_said)
        looked_at = (queries @ keys.mT)[..., :-1].argmax(dim=-1)
        assert torch.equal(looked_at, torch.arange(side * side).expand_as(looked_at))


def test_position_code_is_a_kernel_of_the_distance() -> None:
    code = position_code(cell_centres(torch.zeros(1, 9, 9)))
    kernel = code @ code.T
    torch.testing.assert_close(kernel.diagonal(), torch.full((81,), float(NUM_POSITION_WAVES)))
    moved = position_code(cell_centres(torch.zeros(1, 9, 9)) + torch.tensor([2.5, -1.25]))
    torch.testing.assert_close(moved @ moved.T, kernel, atol=1e-4, rtol=0)  # no place is special
    assert (kernel - torch.diag(kernel.diagonal())).max() < NUM_POSITION_WAVES - 2  # and none looks like another


def test_text_self_attention_is_its_formula() -> None:
    layer = TextSelfAttention(CHANNELS, TEXT_WIDTH, heads=HEADS).requires_grad_(requires_grad=False)
    randomize(layer)
    x = random_map(B, seed=1)
    e = CHANNELS // HEADS
    expected = x.clone()
    for b in range(B):
        positions = layer.norm(x)[b].flatten(1).T
        words = layer.text_norm(TEXT.tokens[b][TEXT.mask[b]])
        q, k, v = (positions @ layer.to_qkv.weight[:, :, 0, 0].T).chunk(3, dim=1)
        text_k, text_v = (words @ layer.text_to_kv.weight.T).chunk(2, dim=1)
        k, v = torch.cat([k, text_k]), torch.cat([v, text_v])
        heads = [slice(g * e, (g + 1) * e) for g in range(HEADS)]
        attended = [(q[:, g] @ k[:, g].T / math.sqrt(e)).softmax(dim=1) @ v[:, g] for g in heads]
        out = torch.cat(attended, dim=1) @ layer.project_out.weight[:, :, 0, 0].T + layer.project_out.bias
        expected[b] += out.T.view_as(x[b])
    torch.testing.assert_close(layer(x, TEXT), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def refiner() -> TextRefiner:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        refiner = TextRefiner(TEXT_WIDTH, layers=2, heads=HEADS)
    randomize(refiner, scale=0.3)
    return refiner.requires_grad_(requires_grad=False)


def slow_refined(layer: TextRefinerLayer, tokens: Tensor) -> Tensor:
    """One text without padding, token by token and head by head."""
    rows = [layer.to_qkv.weight @ layer.attention_norm(token) for token in tokens]
    size = TEXT_WIDTH // HEADS
    refined = []
    for token, row in zip(tokens, rows, strict=True):
        heads = []
        for g in range(HEADS):
            part = slice(g * size, (g + 1) * size)
            q = row[:TEXT_WIDTH][part]
            keys = torch.stack([other[TEXT_WIDTH : 2 * TEXT_WIDTH][part] for other in rows])
            values = torch.stack([other[2 * TEXT_WIDTH :][part] for other in rows])
            heads.append((keys @ q / math.sqrt(size)).softmax(dim=0) @ values)
        seen = token + layer.project_out(torch.cat(heads))
        refined.append(seen + layer.mlp(seen))
    return torch.stack(refined)


def test_refiner_is_its_formula_and_sees_no_padding(refiner: TextRefiner) -> None:
    refined = refiner(TEXT.tokens, TEXT.mask)
    for tokens, mask, found in zip(TEXT.tokens, TEXT.mask, refined, strict=True):
        expected = tokens[mask]
        for layer in refiner.layers:
            assert isinstance(layer, TextRefinerLayer)
            expected = slow_refined(layer, expected)
        torch.testing.assert_close(found[mask], expected, rtol=1e-4, atol=1e-4)


def test_the_first_token_hears_of_the_last(refiner: TextRefiner) -> None:
    """What a text tower that reads from left to right cannot tell."""
    changed = TEXT.tokens.clone()
    changed[0, -1] = changed[0, 0]
    before, after = (refiner(tokens, TEXT.mask)[0, 0] for tokens in (TEXT.tokens, changed))
    assert not torch.allclose(before, after, atol=1e-3)


def test_refiner_of_a_null_text_is_finite(refiner: TextRefiner) -> None:
    assert refiner(TEXT.tokens, torch.zeros_like(TEXT.mask)).isfinite().all()


def test_padding_is_no_text() -> None:
    layer = TextSelfAttention(CHANNELS, TEXT_WIDTH, heads=HEADS)
    randomize(layer)
    x = random_map(B, seed=1)
    noise = random_text(B, seed=8).tokens
    repadded = TextCondition(
        tokens=torch.where(TEXT.mask[..., None], TEXT.tokens, noise), mask=TEXT.mask, pooled=TEXT.pooled
    )
    assert not torch.equal(repadded.tokens, TEXT.tokens)
    assert torch.equal(layer(x, TEXT), layer(x, repadded))


@pytest.fixture(scope="module")
def agree() -> CaptionAgreement:
    module = CaptionAgreement(TEXT_WIDTH, width=7).requires_grad_(requires_grad=False)
    randomize(module)
    return module


def captions_of(agree: CaptionAgreement, captions: TextCondition) -> NeighborKV:
    b, k = captions.mask.shape[:2]
    return NeighborKV(
        keys=(),
        values=(),
        captions=agree.embed(captions.tokens),
        caption_mask=captions.mask,
        mask=torch.ones(b, k, dtype=torch.bool),
    )


def test_agreement_is_the_best_cosine_of_each_word(agree: CaptionAgreement) -> None:
    captions = random_text(B, K, seed=2, num_tokens=4)
    found = agree(TEXT, captions_of(agree, captions))
    for b in range(B):
        for n in range(TEXT.mask.shape[1]):
            for k in range(K):
                word = agree.project(agree.norm(TEXT.tokens[b, n]))
                others = agree.project(agree.norm(captions.tokens[b, k][captions.mask[b, k]]))
                best = torch.cosine_similarity(word[None], others).max() if TEXT.mask[b, n] else torch.tensor(0.0)
                torch.testing.assert_close(found[b, n, k], best, atol=1e-5, rtol=1e-5)


def test_equal_captions_agree_wholly_and_dropped_text_with_nothing(agree: CaptionAgreement) -> None:
    others = random_text(B, K, seed=2)
    captions = TextCondition(
        tokens=torch.cat([TEXT.tokens[:, None], others.tokens], dim=1),
        mask=torch.cat([TEXT.mask[:, None], others.mask], dim=1),
        pooled=torch.cat([TEXT.pooled[:, None], others.pooled], dim=1),
    )
    neighbors = captions_of(agree, captions)
    found = agree(TEXT, neighbors)
    torch.testing.assert_close(found[..., 0], TEXT.mask.float(), atol=1e-6, rtol=0)
    assert found[..., 1:].max() < 0.999
    assert agree(TEXT.drop(torch.ones(B, dtype=torch.bool)), neighbors).abs().max() == 0


def test_padding_of_a_caption_never_agrees(agree: CaptionAgreement) -> None:
    """Not even where it equals the prompt's own words."""
    captions = random_text(B, K, seed=2)
    mask = captions.mask & (torch.arange(captions.mask.shape[-1]) < 2)
    tokens = captions.tokens.clone()
    tokens[:, :, 2:] = TEXT.tokens[:, None, 2:]
    padded = captions_of(agree, TextCondition(tokens=tokens, mask=mask, pooled=captions.pooled))
    short = TextCondition(tokens=captions.tokens[:, :, :2], mask=mask[:, :, :2], pooled=captions.pooled)
    torch.testing.assert_close(agree(TEXT, padded), agree(TEXT, captions_of(agree, short)), atol=1e-6, rtol=0)


def test_a_start_by_content_finds_each_position_where_it_was_moved_to() -> None:
    """Beside a start by place, which looks where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = NeighborAttention(64, TEXT_WIDTH, heads=HEADS, key_width=28, value_width=8)
    picture = torch.randn(1, 64, 4, 4, generator=generator(1))
    moved = torch.randperm(16, generator=generator(2))
    neighbor = picture.flatten(2)[:, :, moved].view(1, 1, 64, 4, 4)
    text = random_text(1, seed=5)
    agreement = torch.zeros(1, text.mask.shape[1], 1)

    def looked_at() -> Tensor:
        keys, _ = layer.project(neighbor)
        queries = layer.queries(picture, torch.ones(1, 1, dtype=torch.bool), text, agreement)
        return (queries @ keys.mT)[..., :-1].argmax(dim=-1)  # but for the sink

    with torch.no_grad():
        layer.to_offset.weight.zero_()
        layer.to_offset.bias.zero_()
        assert (looked_at() == torch.arange(16)).float().mean() > 0.9
        layer.start_by_content()
        assert (looked_at() == moved.argsort()).float().mean() > 0.9
