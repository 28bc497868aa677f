import pytest
import torch

from radt.diffusion.denoiser import target, x0_from
from radt.diffusion.loss import diffusion_loss, sample_times, shift_times
from radt.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
PREDICTIONS = ("eps", "x0", "v")
WEIGHTINGS = ("x0", "eps", "v", "min_snr")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0, eps, noise = torch.randn(3, 4, 3, 8, 8, generator=generator)
    return x0, eps, noise, torch.tensor([0.1, 0.4, 0.6, 0.95])


def loss(output, x0, eps, t, prediction, weighting):
    return diffusion_loss(output, x0=x0, eps=eps, t=t, schedule=SCHEDULE, prediction=prediction, weighting=weighting)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_true_answer_costs_nothing_even_at_the_ends(batch, prediction, weighting):
    x0, eps, _, _ = batch
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    truth = target(x0, eps, t, schedule=SCHEDULE, prediction=prediction)
    assert loss(truth, x0, eps, t, prediction, weighting).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equals_the_weighted_error_of_x0(batch, prediction, weighting):
    # The definition, the slow way through x0: the loss depends on the image meant, not on the parameterisation.
    x0, eps, noise, t = batch
    output = target(x0, eps, t, schedule=SCHEDULE, prediction=prediction) + 0.1 * noise
    x = SCHEDULE.add_noise(x0, eps, t)
    x0_hat = x0_from(output, x, t, schedule=SCHEDULE, prediction=prediction)
    snr = (SCHEDULE.alpha(t) / SCHEDULE.sigma(t)) ** 2
    weight = {"x0": torch.ones(4), "eps": snr, "v": snr + 1, "min_snr": torch.minimum(snr, torch.tensor(5.0))}[
        weighting
    ]
    expected = weight * ((x0_hat - x0) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss(output, x0, eps, t, prediction, weighting), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_own_weighting_is_plain_squared_error(batch, prediction):
    x0, eps, noise, t = batch
    output = target(x0, eps, t, schedule=SCHEDULE, prediction=prediction) + noise
    expected = (noise**2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss(output, x0, eps, t, prediction, prediction), expected)


def test_low_precision_output_gives_a_float32_loss(batch):
    x0, eps, noise, t = batch
    assert loss(noise.bfloat16(), x0, eps, t, "v", "v").dtype == torch.float32


def test_times_fill_every_cell_once_in_changing_order():
    generator = torch.Generator().manual_seed(3)
    first, second = sample_times(generator, 16), sample_times(generator, 16)
    for t in (first, second):
        assert sorted((t * 16).floor().int().tolist()) == list(range(16))
    assert first.argsort().tolist() != second.argsort().tolist()


def test_times_repeat_with_the_generator():
    one, two = (sample_times(torch.Generator().manual_seed(5), 8) for _ in range(2))
    assert torch.equal(one, two)


def test_shifted_times_keep_their_ends_and_order_and_compose():
    t = torch.linspace(0, 1, 101)
    assert torch.equal(shift_times(t, 1.0), t)
    shifted = shift_times(t, 2.5)
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert (shifted.diff() > 0).all()
    assert (shifted[1:-1] > t[1:-1]).all()  # towards noise
    torch.testing.assert_close(shift_times(shifted, 0.4), t)  # 1/2.5 takes it back
    torch.testing.assert_close(shift_times(shift_times(t, 2.0), 3.0), shift_times(t, 6.0))
