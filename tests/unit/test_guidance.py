import math

import pytest
import torch
from torch import nn

from index.errors import ConfigError
from radt.conditioning import Condition, NeighborBatch, NeighborKV, TextCondition, map_tensors
from radt.diffusion.denoiser import Denoiser, eps_from_x0
from radt.diffusion.guidance import classifier_free, interleaved, plan_branches
from radt.diffusion.samplers import SAMPLERS
from radt.diffusion.schedule import NoiseSchedule
from radt.diffusion.thresholding import no_threshold
from radt.unet.unet import UNet, UNetConfig

SCHEDULE = NoiseSchedule()
BATCH, NUM_NEIGHBORS = 3, 2
T = torch.full((BATCH,), 0.6)


class ToyNetwork(nn.Module):
    """Elementwise, so that batching cannot change a bit; reads text, neighbours and both masks; counts calls."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, t, text, neighbors=None, *, low_res=None):
        self.batches.append(len(x))
        said = torch.where(text.mask.any(dim=1), text.pooled[:, 0], -0.7)
        shown = torch.zeros(len(x))
        if neighbors is not None:
            for k in range(neighbors.mask.shape[1]):
                shown = shown + torch.where(neighbors.mask[:, k], neighbors.keys[0][:, 0, k, 0], 0.0)
        said, shown, t = (values[:, None, None, None] for values in (said, shown, t))
        return torch.sin(x + said) * (1 + t) + shown * x + said * shown


@pytest.fixture
def condition():
    generator = torch.Generator().manual_seed(1)
    text = TextCondition(
        tokens=torch.randn(BATCH, 4, 5, generator=generator),
        mask=torch.ones(BATCH, 4, dtype=torch.bool),
        pooled=torch.randn(BATCH, 5, generator=generator),
    )
    kv = torch.randn(BATCH, 1, NUM_NEIGHBORS, 1, generator=generator)
    neighbors = NeighborKV(
        keys=(kv,),
        values=(kv,),
        captions=torch.randn(BATCH, NUM_NEIGHBORS, 4, 2, generator=generator),
        caption_mask=torch.ones(BATCH, NUM_NEIGHBORS, 4, dtype=torch.bool),
        mask=torch.tensor([[True, True], [True, False], [True, True]]),
    )
    return Condition(text=text, neighbors=neighbors)


@pytest.fixture
def x():
    return torch.randn(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def plans(*branches):
    return [tuple(branches)] * BATCH


def guided(network, condition, branches, **changes):
    settings = {"text_guidance": 3.0, "neighbor_guidance": 2.0, "threshold": no_threshold} | changes
    denoiser = Denoiser(network, schedule=SCHEDULE, prediction="eps")
    return interleaved(denoiser, condition, branches=branches, **settings)


def eps_of(x0, x):
    return eps_from_x0(x0, x, T, schedule=SCHEDULE)


def slow_twin(network, condition, x, branch, w_p, w_n):
    """Row R10 as it is written, on eps, in two calls."""
    c_p, c_n = condition.text, condition.neighbors
    whole = network(x, T, c_p, c_n)
    if branch == "text":
        null = TextCondition(tokens=c_p.tokens, mask=torch.zeros_like(c_p.mask), pooled=c_p.pooled)
        return w_p * whole - (w_p - 1) * network(x, T, null, c_n)
    return w_n * whole - (w_n - 1) * network(x, T, c_p, None)


@pytest.mark.parametrize("step", [0, 1])
def test_equals_the_two_call_formula_in_one_call(condition, x, step):
    branches = ("text", "neighbor")
    network = ToyNetwork()
    x0 = guided(network, condition, plans(*branches))(x, 0.6, step)
    assert network.batches == [2 * BATCH]
    expected = slow_twin(ToyNetwork(), condition, x, branches[step], 3.0, 2.0)
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)


def test_each_image_may_have_its_own_plan(condition, x):
    network = ToyNetwork()
    branches = [("text",), ("neighbor",), ("text",)]
    x0 = guided(network, condition, branches)(x, 0.6, 0)
    assert network.batches == [2 * BATCH]
    for i, (branch,) in enumerate(branches):
        alone = guided(ToyNetwork(), condition, plans(branch))(x, 0.6, 0)
        assert torch.equal(x0[i], alone[i])


@pytest.mark.parametrize("branch", ["text", "neighbor"])
def test_the_real_network_in_one_call_equals_two(branch):
    config = UNetConfig(
        image_size=8,
        text_width=6,
        pooled_width=4,
        channels=(16, 16),
        blocks=(1, 1),
        attention_levels=(1,),
        encoder_neighbor_levels=(0, 1),
        decoder_neighbor_levels=(0,),
        embedding_width=16,
    )
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)  # a fresh network answers 0 whatever it is asked

    def text(*batch):
        mask = torch.ones(*batch, 5, dtype=torch.bool)
        return TextCondition(tokens=torch.randn(*batch, 5, 6), mask=mask, pooled=torch.randn(*batch, 4))

    x = torch.randn(BATCH, 3, 8, 8)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    neighbors = NeighborBatch(
        pixels=torch.rand(BATCH, NUM_NEIGHBORS, 3, 8, 8), text=text(BATCH, NUM_NEIGHBORS), mask=mask
    )
    with torch.inference_mode():
        condition = Condition(text=text(BATCH), neighbors=unet.project_neighbors(neighbors))
        x0 = guided(unet, condition, plans(branch))(x, 0.6, 0)
        expected = slow_twin(unet, condition, x, branch, 3.0, 2.0)
        assert not torch.allclose(expected, slow_twin(unet, condition, x, branch, 1.0, 1.0), atol=1e-3)
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)


def test_weight_one_is_the_conditional_prediction_in_one_call(condition, x):
    network = ToyNetwork()
    x0 = guided(network, condition, plans("text", "neighbor"), text_guidance=1.0)(x, 0.6, 0)
    assert network.batches == [BATCH]
    plain = Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="eps")(x, 0.6, condition)
    assert torch.equal(x0, plain)


def test_weight_one_in_a_mixed_batch_is_the_conditional_prediction(condition, x):
    x0 = guided(ToyNetwork(), condition, [("neighbor",), ("text",), ("neighbor",)], neighbor_guidance=1.0)(x, 0.6, 0)
    plain = Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="eps")(x, 0.6, condition)
    assert torch.equal(x0[[0, 2]], plain[[0, 2]])
    assert not torch.equal(x0[1], plain[1])


def test_the_prediction_kind_does_not_matter(condition, x):
    """The combination taken on eps, x0 or v is the same image."""
    base = ToyNetwork()
    alpha, sigma = SCHEDULE.alpha(0.6), SCHEDULE.sigma(0.6)

    def as_v(x, t, text, neighbors=None, *, low_res=None):
        eps = base(x, t, text, neighbors)
        return alpha * eps - sigma * (x - sigma * eps) / alpha

    settings = {"text_guidance": 4.0, "neighbor_guidance": 1.0, "branches": plans("text"), "threshold": no_threshold}
    one = interleaved(Denoiser(base, schedule=SCHEDULE, prediction="eps"), condition, **settings)(x, 0.6, 0)
    two = interleaved(Denoiser(as_v, schedule=SCHEDULE, prediction="v"), condition, **settings)(x, 0.6, 0)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_steps_outside_the_range_see_no_neighbors(condition, x):
    network = ToyNetwork()
    denoise = guided(network, condition, plans("text", "neighbor", "text"), neighbor_steps=range(2, 3))
    textual, plain, whole = (denoise(x, 0.6, step) for step in range(3))
    assert network.batches == [2 * BATCH, BATCH, 2 * BATCH]
    alone = condition.without_neighbors()
    without = slow_twin(ToyNetwork(), alone, x, "text", 3.0, 2.0)
    torch.testing.assert_close(eps_of(textual, x), without, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain, Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="eps")(x, 0.6, alone))
    torch.testing.assert_close(
        eps_of(whole, x), slow_twin(ToyNetwork(), condition, x, "text", 3.0, 2.0), rtol=1e-4, atol=1e-4
    )


def test_without_neighbors_a_neighbor_step_is_one_plain_call(condition, x):
    network = ToyNetwork()
    guided(network, condition.without_neighbors(), plans("neighbor"))(x, 0.6, 0)
    assert network.batches == [BATCH]


def test_classifier_free_by_hand(condition, x):
    alone = condition.without_neighbors()
    network = ToyNetwork()
    denoiser = Denoiser(network, schedule=SCHEDULE, prediction="eps")
    x0 = classifier_free(denoiser, alone, guidance_scale=3.0, threshold=no_threshold)(x, 0.6, 0)
    assert network.batches == [2 * BATCH]
    expected = slow_twin(ToyNetwork(), alone, x, "text", 3.0, 2.0)
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)
    plain = classifier_free(denoiser, alone, guidance_scale=1.0, threshold=no_threshold)(x, 0.6, 0)
    assert network.batches == [2 * BATCH, BATCH]
    assert torch.equal(plain, denoiser(x, 0.6, alone))


def test_the_result_is_thresholded_by_default(condition, x):
    denoiser = Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="eps")
    x0 = classifier_free(denoiser, condition, guidance_scale=9.0)(x * 5, 0.6, 0)
    assert x0.abs().max() == 1


@pytest.mark.parametrize("name", ["text_guidance", "neighbor_guidance"])
@pytest.mark.parametrize("value", [0.5, math.nan])
def test_weights_below_one_are_refused(condition, name, value):
    with pytest.raises(ConfigError, match=name):
        guided(ToyNetwork(), condition, plans("text"), **{name: value})


def test_the_coin_is_the_images_own():
    plan = plan_branches(400, text_share=0.3, order="coin", generator=torch.Generator().manual_seed(7))
    assert plan == plan_branches(400, text_share=0.3, order="coin", generator=torch.Generator().manual_seed(7))
    assert plan != plan_branches(400, text_share=0.3, order="coin", generator=torch.Generator().manual_seed(8))
    assert abs(plan.count("text") / 400 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 400)


def test_orders_by_hand():
    generator = torch.Generator().manual_seed(0)
    untouched = generator.get_state()
    initials = {
        order: "".join(b[0] for b in plan_branches(8, text_share=0.25, order=order, generator=generator))
        for order in ("low_discrepancy", "text_first", "neighbor_first")
    }
    assert initials == {"low_discrepancy": "nnntnnnt", "text_first": "ttnnnnnn", "neighbor_first": "nnnnnntt"}
    assert torch.equal(generator.get_state(), untouched)


@pytest.mark.parametrize(("text_share", "order"), [(1.5, "coin"), (-0.1, "coin"), (0.5, "dice")])
@pytest.mark.usefixtures("untyped_caller")
def test_impossible_plans_are_refused(text_share, order):
    with pytest.raises(ConfigError):
        plan_branches(4, text_share=text_share, order=order, generator=torch.Generator())


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_image_i_of_a_batch_equals_image_i_alone(condition, sampler):
    """Guided, each with its own plan from its own generator, through every sampler: bit for bit."""
    num_steps = 6
    times = SCHEDULE.time_steps(num_steps)

    def draw(rows):
        generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        branches = [plan_branches(num_steps, text_share=0.5, order="coin", generator=g) for g in generators]
        noise = torch.stack([torch.randn(3, 4, 4, generator=g) for g in generators])
        given = Condition(text=pick(condition.text, rows), neighbors=pick(condition.neighbors, rows))
        denoiser = Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="v")
        denoise = interleaved(denoiser, given, text_guidance=3.0, neighbor_guidance=2.0, branches=branches)
        return SAMPLERS[sampler](
            denoise, noise, times, schedule=SCHEDULE, generators=generators, branches=branches
        ), branches

    together, branches = draw(range(BATCH))
    assert len(set(branches)) > 1  # else the plans' being apart is not tested
    for row in range(BATCH):
        assert torch.equal(draw([row])[0][0], together[row])


def pick(record, rows):
    """The given rows of a batch of conditions."""
    return map_tensors(lambda tensor: tensor[list(rows)], record)
