"""Laws of the diffusion core that hold for every time, share and size."""

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radt.diffusion.denoiser import eps_from_x0, target, x0_from
from radt.diffusion.guidance import plan_branches
from radt.diffusion.loss import diffusion_loss, sample_times
from radt.diffusion.schedule import NoiseSchedule
from radt.diffusion.thresholding import dynamic_threshold

law = settings(deadline=None, derandomize=True, max_examples=60)
times = st.floats(0, 1)
curves = st.sampled_from(["cosine", "linear"])
kinds = st.sampled_from(["eps", "x0", "v"])
seeds = st.integers(0, 2**32)


@law
@given(curves, times)
def test_variance_is_preserved(curve, t):
    schedule = NoiseSchedule(curve=curve)
    assert math.isclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, abs_tol=1e-12)
    assert math.isclose(2 * math.log(schedule.alpha(t) / schedule.sigma(t)), schedule.log_snr(t), abs_tol=1e-6)


@law
@given(curves, times, times)
def test_log_snr_strictly_decreases_and_is_finite(curve, s, t):
    schedule = NoiseSchedule(curve=curve)
    assert math.isfinite(schedule.log_snr(t))
    if t - s > 1e-6:
        assert schedule.log_snr(t) < schedule.log_snr(s)


@law
@given(st.integers(1, 300), st.floats(0.1, 1))
def test_times_strictly_descend_to_zero(num_steps, t_max):
    steps = NoiseSchedule().time_steps(num_steps, t_max=t_max)
    assert len(steps) == num_steps + 1
    assert steps[0] == t_max
    assert steps[-1] == 0
    assert all(later < earlier for earlier, later in pairwise(steps))


@law
@given(curves, kinds, st.floats(0.02, 0.98), seeds)
def test_predictions_mean_the_same_image(curve, kind, t, seed):
    schedule = NoiseSchedule(curve=curve)
    x0, eps = torch.randn(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t = torch.full((2,), t, dtype=torch.float64)
    x = schedule.add_noise(x0, eps, t)
    back = x0_from(target(x0, eps, t, schedule=schedule, prediction=kind), x, t, schedule=schedule, prediction=kind)
    torch.testing.assert_close(back, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_from_x0(back, x, t, schedule=schedule), eps, rtol=1e-6, atol=1e-6)


@law
@given(curves, kinds, st.sampled_from(["x0", "eps", "v", "min_snr"]), times, seeds)
def test_loss_is_zero_for_the_truth_and_finite_for_any_other(curve, kind, weighting, t, seed):
    schedule = NoiseSchedule(curve=curve)
    x0, eps = torch.randn(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    t = torch.full((2,), t)
    fixed = {"x0": x0, "eps": eps, "t": t, "schedule": schedule, "prediction": kind, "weighting": weighting}
    truth = target(x0, eps, t, schedule=schedule, prediction=kind)
    assert diffusion_loss(truth, **fixed).tolist() == [0, 0]
    wrong = diffusion_loss(truth + 1, **fixed)
    assert bool((wrong.isfinite() & (wrong > 0)).all())


@law
@given(seeds, st.integers(1, 257))
def test_sampled_times_fill_every_cell(seed, batch):
    t = sample_times(torch.Generator().manual_seed(seed), batch)
    cells = (t.sort().values * batch - torch.arange(batch)).tolist()
    assert all(-1e-4 <= cell <= 1 + 1e-4 for cell in cells)


@law
@given(st.integers(0, 200), st.floats(0, 1), st.sampled_from(["low_discrepancy", "text_first", "neighbor_first"]))
def test_interleaving_takes_exactly_the_share(num_steps, text_share, order):
    plan = plan_branches(num_steps, text_share=text_share, order=order, generator=torch.Generator())
    assert len(plan) == num_steps
    assert plan.count("text") == math.floor(num_steps * text_share)


@law
@given(st.integers(1, 100), st.floats(0, 1))
def test_low_discrepancy_is_even_in_every_beginning(num_steps, text_share):
    plan = plan_branches(num_steps, text_share=text_share, order="low_discrepancy", generator=torch.Generator())
    for n in range(num_steps + 1):
        assert abs(plan[:n].count("text") - n * text_share) <= 1


@law
@given(seeds, st.sampled_from(["coin", "low_discrepancy", "text_first", "neighbor_first"]))
def test_shares_of_nothing_and_everything(seed, order):
    generator = torch.Generator().manual_seed(seed)
    assert set(plan_branches(20, text_share=0.0, order=order, generator=generator)) == {"neighbor"}
    assert set(plan_branches(20, text_share=1.0, order=order, generator=generator)) == {"text"}


@law
@given(seeds, st.floats(0.1, 30), st.floats(0.5, 1))
def test_dynamic_thresholding_keeps_range_and_order(seed, scale, percentile):
    x0 = scale * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    y = dynamic_threshold(4, percentile=percentile)(x0, 0)
    assert float(y.abs().max()) <= 1
    flat, result = x0.flatten(1), y.flatten(1)
    assert bool((result.gather(1, flat.argsort(1)).diff(dim=1) >= 0).all())
