import math
from itertools import pairwise

import pytest
import torch

from radt.diffusion.samplers import SAMPLERS, sample_ancestral, sample_ddim, sample_dpmpp_2m
from radt.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
MEAN, DEVIATION = 0.4, 0.3
RANDOM = ["ancestral", "stochastic"]


class GaussianDenoise:
    """The exact E[x0 | x_t] for pixels drawn from N(MEAN, DEVIATION^2), with everything known in closed form."""

    def __init__(self, schedule=SCHEDULE):
        self.calls, self.schedule = [], schedule

    def __call__(self, x, t, step):
        self.calls.append((t, step))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        gain = DEVIATION**2 * alpha / (alpha**2 * DEVIATION**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    @staticmethod
    def solve(x, t, t_end=0.0):
        """Where the probability-flow ODE takes x from t to t_end: x keeps its number of standard deviations."""
        score = (x - SCHEDULE.alpha(t) * MEAN) / marginal_deviation(t)
        return SCHEDULE.alpha(t_end) * MEAN + marginal_deviation(t_end) * score


def marginal_deviation(t):
    return math.sqrt(SCHEDULE.alpha(t) ** 2 * DEVIATION**2 + SCHEDULE.sigma(t) ** 2)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(sampler, num_steps, x, **arguments):
    times = SCHEDULE.time_steps(num_steps)
    return SAMPLERS[sampler](GaussianDenoise(), x, times, schedule=SCHEDULE, **arguments)


def orders(sampler, **arguments):
    """The slopes of log error against log steps between two inner times.

    Inner, because towards t = 0 and t = 1 the log-SNR changes ever faster, which blurs the order with a logarithm.
    """
    x = noise((1, 1, 8, 8))
    start, end = 0.9, 0.1
    exact = GaussianDenoise.solve(x, start, end)
    errors = []
    for num_steps in (64, 128, 256):
        times = [start + (end - start) * i / num_steps for i in range(num_steps + 1)]
        result = SAMPLERS[sampler](GaussianDenoise(), x, times, schedule=SCHEDULE, generators=[], **arguments)
        errors.append(float((result - exact).abs().max()))
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def test_ddim_is_first_order():
    assert all(0.9 <= slope <= 1.1 for slope in orders("ddim"))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_second_order(sampler):
    assert all(slope >= 1.8 for slope in orders(sampler))


def test_a_branch_that_never_changes_keeps_the_order():
    assert all(slope >= 1.8 for slope in orders("dpmpp_2m", branches=[("text",) * 256]))


def test_every_deterministic_sampler_reaches_the_closed_form_and_second_order_is_closer():
    x = noise((1, 1, 8, 8))
    exact = GaussianDenoise.solve(x, 1.0)
    names = SAMPLERS.keys() - RANDOM
    errors = {name: float((run(name, 50, x, generators=[]) - exact).abs().max()) for name in names}
    assert errors["ddim"] < 0.05
    assert errors["heun"] < errors["ddim"] / 3
    assert errors["dpmpp_2m"] < errors["ddim"] / 5


def test_a_change_of_branch_is_one_first_order_step():
    """A plan that changes at every step leaves only first-order steps: DDIM, by another formula."""
    x = noise((2, 1, 4, 4))
    alternating = ("text", "neighbor") * 5
    multistep = run("dpmpp_2m", 10, x, generators=[], branches=[alternating, ("text",) * 10])
    first_order = run("ddim", 10, x, generators=[])
    torch.testing.assert_close(multistep[0], first_order[0])
    assert not torch.allclose(multistep[1], first_order[1])
    assert torch.equal(multistep[1], run("dpmpp_2m", 10, x, generators=[])[1])


def test_dpmpp_2m_histories_of_images_are_apart():
    x = noise((2, 1, 4, 4))
    plans = [("text",) * 10, ("text", "neighbor") * 5]
    together = run("dpmpp_2m", 10, x, generators=[], branches=plans)
    for i in range(2):
        assert torch.equal(run("dpmpp_2m", 10, x[i : i + 1], generators=[], branches=[plans[i]])[0], together[i])
    assert not torch.equal(run("dpmpp_2m", 10, x[1:], generators=[])[0], together[1])


def test_heun_stays_within_a_step():
    denoise = GaussianDenoise()
    SAMPLERS["heun"](denoise, noise((1, 1, 2, 2)), [1.0, 0.5, 0.0], schedule=SCHEDULE, generators=[])
    assert denoise.calls == [(1.0, 0), (0.5, 0), (0.5, 1)]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_ancestral_reproduces_mean_and_variance(gamma):
    x = noise((1, 1, 128, 128))
    samples = sample_ancestral(
        GaussianDenoise(), x, SCHEDULE.time_steps(200), schedule=SCHEDULE, generators=seeded(1), gamma=gamma
    )
    n = samples.numel()
    assert abs(samples.mean() - MEAN) < 5 * DEVIATION / math.sqrt(n)
    assert abs(samples.std() - DEVIATION) < 5 * DEVIATION / math.sqrt(2 * n) + 0.01 * DEVIATION


def moments(sampler, num_steps, monkeypatch, *, schedule=SCHEDULE, **arguments):
    """The exact mean and deviation of what a sampler draws for Gaussian data, without drawing anything.

    Every sampler is affine in x and in its noises here, so one picture a random number, in which that one is 1 and the
    others are 0, gives its coefficient; a last picture of zeros gives the mean.
    """
    drawn = iter(range(1, num_steps + 1))
    x = torch.zeros(num_steps + 2, 1, 1, 1, dtype=torch.float64)

    def unit(like, generators):
        picture = torch.zeros_like(like)
        picture[next(drawn)] = 1
        return picture

    monkeypatch.setattr("radt.diffusion.samplers.draw_noise", unit)
    x[0] = 1
    times = schedule.time_steps(num_steps)
    denoise = GaussianDenoise(schedule)
    answers = SAMPLERS[sampler](denoise, x, times, schedule=schedule, generators=[], **arguments).flatten()
    return float(answers[-1]), float((answers[:-1] - answers[-1]).square().sum().sqrt())


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("curve", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 40])
def test_any_step_count_and_any_schedule(sampler, curve, num_steps, monkeypatch):
    """The mean is right to the part of it that x_1 still holds; the deviation is short, and less so with more steps."""
    mean, deviation = moments(sampler, num_steps, monkeypatch, schedule=NoiseSchedule(curve=curve))
    assert abs(mean - MEAN) < 0.02
    assert 0 <= deviation < 1.06 * DEVIATION
    if num_steps == 40:
        assert deviation > 0.75 * DEVIATION


@pytest.mark.parametrize(
    ("sampler", "arguments"), [("stochastic", {}), ("ancestral", {}), ("ancestral", {"gamma": 1.0})]
)
def test_the_bias_of_random_samplers_falls_with_the_steps(sampler, arguments, monkeypatch):
    """To first order in the step: the exact deviation of the samples, by `moments`, against that of the data."""
    errors = []
    for num_steps in (40, 80, 160):
        with monkeypatch.context() as patch:
            errors.append(abs(moments(sampler, num_steps, patch, **arguments)[1] - DEVIATION))
    assert all(math.log2(coarse / fine) >= 0.8 for coarse, fine in pairwise(errors))


def test_stochastic_by_hand():
    """DDIM two times on to k, then a z_k + sqrt(sigma_s^2 - a^2 sigma_k^2) eps with a = alpha_s / alpha_k."""
    times = [0.9, 0.6, 0.3, 0.0]
    x, denoise = noise((1, 1, 2, 2)), GaussianDenoise()
    eps = torch.Generator().manual_seed(8)
    fresh = [torch.randn(1, 2, 2, generator=eps).double() for _ in range(2)]
    alpha, sigma = [SCHEDULE.alpha(t) for t in times], [SCHEDULE.sigma(t) for t in times]
    first = denoise(x, times[0], 0)
    far = alpha[2] * first + sigma[2] * (x - alpha[0] * first) / sigma[0]
    ratio = alpha[1] / alpha[2]
    x1 = ratio * far + math.sqrt(sigma[1] ** 2 - (ratio * sigma[2]) ** 2) * fresh[0]
    second = denoise(x1, times[1], 1)  # two steps on lies the clean image itself
    x2 = alpha[2] * second + sigma[2] * fresh[1]
    ours = SAMPLERS["stochastic"](denoise, x, times, schedule=SCHEDULE, generators=seeded(8))
    torch.testing.assert_close(ours, denoise(x2, times[2], 2))


def test_stochastic_reproduces_mean_and_variance():
    x = noise((1, 1, 128, 128))
    samples = run("stochastic", 200, x, generators=seeded(1))
    n = samples.numel()
    assert abs(samples.mean() - MEAN) < 5 * DEVIATION / math.sqrt(n)
    assert abs(samples.std() - DEVIATION) < 5 * DEVIATION / math.sqrt(2 * n) + 0.01 * DEVIATION


def test_ddim_with_eta_one_is_the_ancestral_sampler():
    x = noise((1, 1, 4, 4))
    times = SCHEDULE.time_steps(10)
    ddim = sample_ddim(GaussianDenoise(), x, times, schedule=SCHEDULE, generators=seeded(3), eta=1.0)
    ancestral = sample_ancestral(GaussianDenoise(), x, times, schedule=SCHEDULE, generators=seeded(3))
    torch.testing.assert_close(ddim, ancestral)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_image_i_of_eight_equals_image_i_alone(sampler):
    x = noise((8, 3, 4, 4)).float()
    together = run(sampler, 7, x, generators=seeded(*range(8)))
    for i in (0, 5, 7):
        assert torch.equal(run(sampler, 7, x[i : i + 1], generators=seeded(i))[0], together[i])


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_same_generator_gives_the_same_image(sampler):
    x = noise((1, 3, 4, 4)).float()
    one, two = (run(sampler, 5, x, generators=seeded(4)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("sampler", RANDOM)
def test_other_generators_give_other_images_where_noise_is_drawn(sampler):
    x = noise((1, 3, 4, 4)).float()
    assert not torch.equal(run(sampler, 5, x, generators=seeded(4)), run(sampler, 5, x, generators=seeded(5)))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_step_is_shown_and_the_last_is_the_result(sampler):
    shown = []
    x = noise((1, 1, 2, 2)).float()
    image = run(sampler, 5, x, generators=seeded(0), on_step=lambda step, x0: shown.append((step, x0)))
    assert [step for step, _ in shown] == [0, 1, 2, 3, 4]
    assert torch.equal(shown[-1][1], image)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_one_step_is_the_denoisers_own_answer(sampler):
    x = noise((1, 1, 2, 2)).float()
    assert torch.equal(run(sampler, 1, x, generators=seeded(0)), GaussianDenoise()(x, 1.0, 0))


def test_dpmpp_2m_by_hand():
    """Two steps and the answer, from Algorithm 2 of Lu et al. with lambda = log(alpha / sigma)."""
    times = [0.9, 0.6, 0.3, 0.0]
    x = noise((1, 1, 1, 1))
    denoise = GaussianDenoise()
    alpha, sigma = [SCHEDULE.alpha(t) for t in times], [SCHEDULE.sigma(t) for t in times]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    first = denoise(x, times[0], 0)
    x1 = sigma[1] / sigma[0] * x - alpha[1] * (math.exp(-(lam[1] - lam[0])) - 1) * first
    second = denoise(x1, times[1], 1)
    h, h_before = lam[2] - lam[1], lam[1] - lam[0]
    r = h_before / h
    mixed = (1 + 1 / (2 * r)) * second - 1 / (2 * r) * first
    x2 = sigma[2] / sigma[1] * x1 - alpha[2] * (math.exp(-h) - 1) * mixed
    ours = sample_dpmpp_2m(denoise, x, times, schedule=SCHEDULE, generators=[])
    torch.testing.assert_close(ours, denoise(x2, times[2], 2))
