import dataclasses
import math

import pytest
import torch
from torch import nn

from index.errors import ConfigError
from radt.conditioning import Condition, NeighborBatch, NeighborKV, TextCondition, concatenate, map_tensors
from radt.diffusion.denoiser import Denoiser, eps_from_x0
from radt.diffusion.guidance import Mix, check_effect, guided, mix, oscillate, plan_branches, plan_guidance
from radt.diffusion.samplers import SAMPLERS, same_branch
from radt.diffusion.schedule import NoiseSchedule
from radt.diffusion.thresholding import no_threshold, static_threshold
from radt.settings import GenerateSettings
from radt.unet.unet import UNet, UNetConfig
from tests.networks import random_neighbors, random_pixels, random_text, random_unet

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


def interleaved(denoiser, condition, *, branches, threshold=static_threshold, **weights):
    """Guidance by row R10 with branches at hand."""
    mixes = [tuple(mix(branch, **weights) for branch in one) for one in branches]
    return guided(denoiser, condition, mixes, threshold=threshold)


def by_branches(network, condition, branches, **changes):
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
    x0 = by_branches(network, condition, plans(*branches))(x, 0.6, step)
    assert network.batches == [2 * BATCH]
    expected = slow_twin(ToyNetwork(), condition, x, branches[step], 3.0, 2.0)
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)


def test_each_image_may_have_its_own_plan(condition, x):
    network = ToyNetwork()
    branches = [("text",), ("neighbor",), ("text",)]
    x0 = by_branches(network, condition, branches)(x, 0.6, 0)
    assert network.batches == [2 * BATCH]
    for i, (branch,) in enumerate(branches):
        alone = by_branches(ToyNetwork(), condition, plans(branch))(x, 0.6, 0)
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
        x0 = by_branches(unet, condition, plans(branch))(x, 0.6, 0)
        expected = slow_twin(unet, condition, x, branch, 3.0, 2.0)
        assert not torch.allclose(expected, slow_twin(unet, condition, x, branch, 1.0, 1.0), atol=1e-3)
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)


def test_weight_one_is_the_conditional_prediction_in_one_call(condition, x):
    network = ToyNetwork()
    x0 = by_branches(network, condition, plans("text", "neighbor"), text_guidance=1.0)(x, 0.6, 0)
    assert network.batches == [BATCH]
    plain = Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="eps")(x, 0.6, condition)
    assert torch.equal(x0, plain)


def test_weight_one_in_a_mixed_batch_is_the_conditional_prediction(condition, x):
    branches = [("neighbor",), ("text",), ("neighbor",)]
    x0 = by_branches(ToyNetwork(), condition, branches, neighbor_guidance=1.0)(x, 0.6, 0)
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


def test_without_neighbors_a_neighbor_step_is_one_plain_call(condition, x):
    network = ToyNetwork()
    alone = mix("neighbor", text_guidance=2.0, neighbor_guidance=3.0).hide_neighbors()
    by_plan(network, condition.without_neighbors(), alone)(x, 0.6, 0)
    assert network.batches == [BATCH]


def joint(w_p, w_n):
    return mix("joint", text_guidance=w_p, neighbor_guidance=w_n)


def by_plan(network, condition, *plan, **changes):
    """The same plan for every image."""
    denoiser = Denoiser(network, schedule=SCHEDULE, prediction="eps")
    return guided(denoiser, condition, [plan] * BATCH, **({"threshold": no_threshold} | changes))


def without_text(condition):
    c_p = condition.text
    return TextCondition(tokens=c_p.tokens, mask=torch.zeros_like(c_p.mask), pooled=c_p.pooled)


def test_joint_guidance_is_instruct_pix2pix_in_one_call(condition, x):
    """Brooks et al. 2022, equation 3, as it is written, with the neighbours for the image: three calls."""
    network, slow = ToyNetwork(), ToyNetwork()
    x0 = by_plan(network, condition, joint(3.0, 2.0))(x, 0.6, 0)
    assert network.batches == [3 * BATCH]
    null, c_p, c_n = without_text(condition), condition.text, condition.neighbors
    neither, shown, both = slow(x, T, null, None), slow(x, T, null, c_n), slow(x, T, c_p, c_n)
    expected = neither + 2.0 * (shown - neither) + 3.0 * (both - shown)
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("w_p", "w_n", "rows"), [(1.0, 1.0, 1), (3.0, 3.0, 2), (3.0, 1.0, 2), (1.0, 2.0, 3)])
def test_a_joint_step_computes_only_what_it_weighs(condition, x, w_p, w_n, rows):
    network = ToyNetwork()
    by_plan(network, condition, joint(w_p, w_n))(x, 0.6, 0)
    assert network.batches == [rows * BATCH]


def test_joint_guidance_with_equal_weights_is_classifier_free_guidance(condition, x):
    """Ho and Salimans 2022, equation 6."""
    slow = ToyNetwork()
    x0 = by_plan(ToyNetwork(), condition, joint(3.0, 3.0))(x, 0.6, 0)
    given, nothing = slow(x, T, condition.text, condition.neighbors), slow(x, T, without_text(condition), None)
    torch.testing.assert_close(eps_of(x0, x), 3 * given - 2 * nothing, rtol=1e-4, atol=1e-4)


def test_joint_guidance_without_neighbors_weighs_the_text_alone(condition, x):
    alone, network = condition.without_neighbors(), ToyNetwork()
    x0 = by_plan(network, alone, joint(3.0, 2.0).hide_neighbors())(x, 0.6, 0)
    assert network.batches == [2 * BATCH]
    expected = slow_twin(ToyNetwork(), alone, x, "text", 3.0, 2.0)
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", ["interleaved", "joint"])
@pytest.mark.parametrize(("w_p", "has_neighbors"), [(1.0, True), (1.0, False), (3.0, False)])
def test_where_branches_mix_alike_there_is_one_field(guidance, w_p, has_neighbors):
    """So that a multistep sampler keeps its order: without guidance, and in the joint form without neighbours."""
    settings = GenerateSettings(text_guidance=w_p, neighbor_guidance=1.0, guidance=guidance)
    plan = plan_guidance(settings, SCHEDULE.time_steps(6), generator=torch.Generator(), has_neighbors=has_neighbors)
    assert (len(set(plan)) == 1) == (w_p == 1 or guidance == "joint")


@pytest.mark.parametrize("branch", ["text", "neighbor", "joint"])
@pytest.mark.parametrize("w_p", [1.0, 3.3, 7.1])
def test_the_weights_of_every_mix_add_up_to_one(branch, w_p):
    now = mix(branch, text_guidance=w_p, neighbor_guidance=4.1)
    for one in (now, now.hide_neighbors()):
        assert sum(one.weights) == pytest.approx(1, abs=1e-12)
    assert now.hide_neighbors().given == now.hide_neighbors().without_text == 0


def test_images_of_one_batch_may_cost_different_rows(condition, x):
    """Plain, interleaved and joint side by side, each as it is alone; the rows told are those of the call."""
    plans, told, network = (
        [(Mix(),), (mix("text", text_guidance=3.0, neighbor_guidance=2.0),), (joint(3, 2),)],
        [],
        ToyNetwork(),
    )
    denoiser = Denoiser(network, schedule=SCHEDULE, prediction="eps")
    x0 = guided(denoiser, condition, plans, threshold=no_threshold, on_call=told.append)(x, 0.6, 0)
    assert network.batches == [1 + 2 + 3]
    assert told == [(1, 2, 3)]
    for i, plan in enumerate(plans):
        assert torch.equal(x0[i], by_plan(ToyNetwork(), condition, *plan)(x, 0.6, 0)[i])


@pytest.mark.parametrize("branch", ["text", "neighbor", "joint"])
def test_a_negative_prompt_stands_in_the_place_of_the_null_text(condition, x, branch):
    """It changes the branches that leave the text out, to what the network says of it, and no other."""
    g = torch.Generator().manual_seed(5)
    negative = TextCondition(
        tokens=torch.randn(BATCH, 4, 5, generator=g),
        mask=torch.ones(BATCH, 4, dtype=torch.bool),
        pooled=torch.randn(BATCH, 5, generator=g),
    )
    now = mix(branch, text_guidance=3.0, neighbor_guidance=2.0)
    x0 = by_plan(ToyNetwork(), dataclasses.replace(condition, negative=negative), now)(x, 0.6, 0)
    slow, c_p, c_n = ToyNetwork(), condition.text, condition.neighbors
    answers = (slow(x, T, c_p, c_n), slow(x, T, negative, c_n), slow(x, T, c_p, None), slow(x, T, negative, None))
    expected = sum(weight * answer for weight, answer in zip(now.weights, answers, strict=True))
    torch.testing.assert_close(eps_of(x0, x), expected, rtol=1e-4, atol=1e-4)
    plain = by_plan(ToyNetwork(), condition, now)(x, 0.6, 0)
    assert torch.equal(x0, plain) == (branch == "neighbor")


def planned(times, **changes):
    settings = GenerateSettings(**({"text_guidance": 3.0, "neighbor_guidance": 2.0} | changes))
    return plan_guidance(settings, times, generator=torch.Generator().manual_seed(0))


def test_steps_that_begin_outside_the_interval_are_not_guided():
    plan = planned([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], guidance_interval=(0.4, 0.8), guidance="joint")
    assert plan == (Mix(), joint(3, 2), joint(3, 2), joint(3, 2), Mix())


def test_an_unguided_step_is_one_row_of_the_conditional_prediction(condition, x):
    network = ToyNetwork()
    x0 = by_plan(network, condition, Mix())(x, 0.6, 0)
    assert network.batches == [BATCH]
    assert torch.equal(x0, Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="eps")(x, 0.6, condition))


def test_steps_that_begin_outside_the_neighbor_interval_see_no_neighbors(condition, x):
    times = [0.9, 0.6, 0.3, 0.0]
    plan = planned(
        times, neighbor_interval=(0.5, 1.0), guidance_interval=(0.0, 0.5), order="text_first", text_share=1.0
    )
    network = ToyNetwork()
    denoise = by_plan(network, condition, *plan)
    whole, _, textual = (denoise(x, 0.6, step) for step in range(3))
    assert network.batches == [BATCH, BATCH, 2 * BATCH]
    denoiser = Denoiser(ToyNetwork(), schedule=SCHEDULE, prediction="eps")
    assert torch.equal(whole, denoiser(x, 0.6, condition))
    expected = slow_twin(ToyNetwork(), condition.without_neighbors(), x, "text", 3.0, 2.0)
    torch.testing.assert_close(eps_of(textual, x), expected, rtol=1e-4, atol=1e-4)


def test_weights_oscillate_within_each_branch_after_steps_of_full_weight():
    """By step instead of within the branch, alternating branches would leave one of them low for ever."""
    alternating = ("neighbor", "text") * 4
    high = math.inf
    assert oscillate(alternating, low=1.0, after=2) == [high, high, 1.0, 1.0, high, high, 1.0, 1.0]
    assert oscillate(("joint",) * 5, low=1.5, after=1) == [high, 1.5, high, 1.5, high]


def test_the_low_weight_is_a_ceiling():
    plan = planned([1.0, 0.75, 0.5, 0.25, 0.0], oscillate_to=2.5, guidance="joint")
    assert plan == (joint(2.5, 2), joint(3, 2), joint(2.5, 2), joint(3, 2))


def test_a_multistep_sampler_takes_a_first_order_step_where_the_field_changes():
    """Where guidance begins and ends, and where its weights change, x0 of the step before is of another field."""
    times = [0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.0]
    plan = planned(times, guidance="joint", guidance_interval=(0.4, 0.8), oscillate_to=1.0, oscillate_after=3)
    assert [now.num_rows for now in plan] == [1, 3, 3, 1, 1, 1]
    same = same_branch([plan] * 2, 0, torch.zeros(2, 1, 1, 1))
    assert [bool(same_branch([plan], step, torch.zeros(1, 1, 1, 1))) for step in range(6)] == [
        True,
        *[False, True] * 2,
        True,
    ]
    assert same.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval"),
        ({"neighbor_interval": (0.0, 1.5)}, "neighbor_interval"),
        ({"oscillate_to": 0.5}, "oscillate_to"),
        ({"oscillate_after": -1}, "oscillate_after"),
        ({"percentile": 99.5}, "percentile"),
        ({"gamma": 1.5}, "gamma"),
    ],
)
def test_impossible_settings_are_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        GenerateSettings(**changes)


def test_settings_without_effect_are_refused():
    for idle in ({"text_guidance": 1.0}, {"text_share": 0.0}, {"unconditional": True}):
        with pytest.raises(ConfigError, match="negative_prompt has no effect"):
            check_effect(GenerateSettings(negative_prompt="blurry", **idle))
    with pytest.raises(ConfigError, match="ancestral"):
        check_effect(GenerateSettings(gamma=0.5, sampler="heun"))
    check_effect(GenerateSettings(gamma=0.5, sampler="ancestral", negative_prompt="blurry"))
    check_effect(GenerateSettings(negative_prompt="blurry", text_share=0.0, guidance="joint"))


def sharing_unet(**changes):
    """Neighbours at the bottleneck and in the decoder, so that the encoder can be shared. In double precision."""
    return random_unet(**({"encoder_neighbor_levels": (2,), "decoder_neighbor_levels": (0, 1)} | changes)).double()


def in_double(record):
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, record)


@pytest.mark.parametrize("encoder_neighbor_levels", [(), (2,)])
def test_predictions_that_share_the_encoder_equal_those_that_do_not(encoder_neighbor_levels):
    unet = sharing_unet(encoder_neighbor_levels=encoder_neighbor_levels)
    assert unet.shares_encoder
    x, t, text = random_pixels(2).double(), torch.tensor([0.3, 0.7], dtype=torch.float64), in_double(random_text(2))
    rows = torch.tensor([0, 1, 0, 1])
    with torch.inference_mode():
        pairs = in_double(random_neighbors(2, 2))
        neighbors = concatenate([unet.project_neighbors(pairs)] * 2).drop(torch.tensor([False, False, True, True]))
        shared = unet.predict_rows(x, t, text, neighbors, rows=rows)
        apart = unet(x[rows], t[rows], concatenate([text, text]), neighbors)
    torch.testing.assert_close(shared, apart, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(shared[:2], shared[2:], atol=1e-3)  # the neighbours do something


@pytest.mark.parametrize("branch", ["text", "neighbor", "joint"])
def test_guidance_runs_the_encoder_once_for_rows_that_differ_in_neighbors_alone(branch):
    """As without sharing, from fewer rows of the encoder: one less for the neighbours' and the joint mix."""
    unet = sharing_unet().float()
    seen = []
    unet.encoder[0].register_forward_hook(lambda module, given, output: seen.append(len(output)))
    condition = Condition(text=random_text(2), neighbors=unet.project_neighbors(random_neighbors(2, 2)))
    seen.clear()
    x, now = random_pixels(2), mix(branch, text_guidance=3.0, neighbor_guidance=2.0)

    def draw(network):
        denoiser = Denoiser(network, schedule=SCHEDULE, prediction="v")
        return guided(denoiser, condition, [(now,)] * 2, threshold=no_threshold)(x, 0.6, 0)

    with torch.inference_mode():
        shared, apart = draw(unet), draw(lambda *given, **more: unet(*given, **more))
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)
    assert seen == {"text": [4, 4], "neighbor": [2, 4], "joint": [4, 6]}[branch]


def test_an_encoder_that_looks_at_neighbors_is_not_shared():
    unet = random_unet()
    assert not unet.shares_encoder
    denoiser = Denoiser(unet, schedule=SCHEDULE, prediction="v")
    assert not denoiser.shares_encoder


@pytest.mark.parametrize("name", ["text_guidance", "neighbor_guidance"])
@pytest.mark.parametrize("value", [0.5, math.nan])
def test_weights_below_one_are_refused(condition, name, value):
    with pytest.raises(ConfigError, match=name):
        by_branches(ToyNetwork(), condition, plans("text"), **{name: value})


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
