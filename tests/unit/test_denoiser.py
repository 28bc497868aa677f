import pytest
import torch

from radt.conditioning import Condition, TextCondition
from radt.diffusion.denoiser import Denoiser, eps_from_x0, target, x0_from
from radt.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
CONDITION = Condition(
    text=TextCondition(tokens=torch.zeros(4, 1, 2), mask=torch.ones(4, 1, dtype=torch.bool), pooled=torch.zeros(4, 2))
)


@pytest.fixture
def batch():
    x0, eps = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x0, eps, torch.tensor([0.05, 0.3, 0.7, 0.95])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_round_trip(batch, prediction):
    x0, eps, t = batch
    x = SCHEDULE.add_noise(x0, eps, t)
    output = target(x0, eps, t, schedule=SCHEDULE, prediction=prediction)
    back = x0_from(output, x, t, schedule=SCHEDULE, prediction=prediction)
    torch.testing.assert_close(back, x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eps_from_x0(back, x, t, schedule=SCHEDULE), eps, rtol=1e-3, atol=1e-4)


def test_v_is_the_derivative_by_angle(batch):
    x0, eps, _ = batch
    x0, eps = x0.double(), eps.double()
    t = torch.full((4,), 0.4, dtype=torch.float64)
    angle = torch.atan2(SCHEDULE.sigma(t), SCHEDULE.alpha(t))[0]
    small = 1e-5
    derivative = (
        torch.cos(angle + small) * x0 + torch.sin(angle + small) * eps
        - torch.cos(angle - small) * x0 - torch.sin(angle - small) * eps
    ) / (2 * small)  # fmt: skip
    torch.testing.assert_close(target(x0, eps, t, schedule=SCHEDULE, prediction="v"), derivative, rtol=1e-6, atol=1e-6)


def test_one_time_for_all_equals_a_time_each(batch):
    x, _, _ = batch

    def network(x, t, text, neighbors=None, *, low_res=None):
        return x * t[:, None, None, None]

    denoiser = Denoiser(network, schedule=SCHEDULE, prediction="v")
    assert torch.equal(denoiser(x, 0.3, CONDITION), denoiser(x, torch.full((4,), 0.3), CONDITION))


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_low_precision_stays_inside(batch, prediction):
    x, _, _ = batch
    seen = []
    conv = torch.nn.Conv2d(3, 3, 1)

    def network(x, t, text, neighbors=None, *, low_res=None):
        seen.extend([x.dtype, t.dtype, conv(x).dtype])
        return conv(x)

    with torch.inference_mode():
        low = Denoiser(network, schedule=SCHEDULE, prediction=prediction, dtype=torch.bfloat16)(
            x.double(), 0.5, CONDITION
        )
        full = Denoiser(network, schedule=SCHEDULE, prediction=prediction)(x, 0.5, CONDITION)
    assert seen == [torch.float32, torch.float32, torch.bfloat16] + 3 * [torch.float32]
    assert low.dtype == full.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)
    assert not torch.equal(low, full)
