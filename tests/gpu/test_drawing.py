"""Drawing on a GPU: nothing in a step waits for it, and a compiled network replayed as a CUDA graph draws the same.

On a machine with a GPU: `pytest -m gpu tests/gpu`.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from radt.bundle import StageInfo
from radt.cascade import Cascade, Stage
from radt.compiling import prepare
from radt.conditioning import Condition, take_rows
from radt.diffusion.samplers import SAMPLERS
from radt.settings import GenerateSettings
from tests.networks import random_neighbors, random_text, random_unet

pytestmark = pytest.mark.gpu
SETTINGS = GenerateSettings(steps=4)


def cascade_on(device: str) -> Cascade:
    unet = prepare(random_unet().requires_grad_(requires_grad=False).to(device), device=device)
    return Cascade([Stage(unet=unet, info=StageInfo(name="stage0"))], device=device)


def conditions(cascade: Cascade, rows: int = 1) -> list[Condition]:
    asked = cascade.condition(random_text(1), [random_neighbors(1, 2)], SETTINGS)
    return [take_rows(one, [0] * rows) for one in asked]


@pytest.fixture(scope="module")
def on_gpu() -> Cascade:
    return cascade_on("cuda")


def test_a_gpu_draws_what_a_cpu_draws(on_gpu: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_cpu = cascade_on("cpu")
    here = on_cpu.sample(conditions(on_cpu), SETTINGS, [7])
    there = on_gpu.sample(conditions(on_gpu), SETTINGS, [7])
    torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("order", ["coin", "low_discrepancy"])
def test_no_step_waits_for_the_gpu(on_gpu: Cascade, name: str, order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first step and the last, torch itself refuses whatever would empty the queue."""
    settings = GenerateSettings(steps=4, sampler=name, order=order)
    asked = conditions(on_gpu, rows=2)
    on_gpu.sample(asked, settings, [1, 2])  # libraries load in the first call, and may wait then
    sampler = SAMPLERS[name]

    def watched(denoise: Any, x: Tensor, *given: Any, **more: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return sampler(lambda x, t, step: denoise(x, t, step), x, *given, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setitem(SAMPLERS, name, watched)
    if name == "dpmpp_2m":  # its plan is copied before the first step, and that copy waits
        monkeypatch.setattr("radt.diffusion.samplers.same_branch", lambda branches, step, x: x.new_ones(len(x)))
    on_gpu.sample(asked, settings, [1, 2])


def test_convolutions_have_channels_last(on_gpu: Cascade) -> None:
    kernel = on_gpu.stages[0].unet.get_parameter("conv_out.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert kernel.is_cuda


COMPILED = """
import torch
from radt.bundle import StageInfo
from radt.cascade import Cascade, Stage
from radt.compiling import prepare
from radt.settings import GenerateSettings
from tests.networks import random_neighbors, random_text, random_unet

settings, drawn = GenerateSettings(steps=4), []
for compiled in (False, True):
    unet = prepare(random_unet().requires_grad_(False).to("cuda"), device="cuda", compiled=compiled)
    cascade = Cascade([Stage(unet=unet, info=StageInfo(name="stage0"))], device="cuda")
    asked = cascade.condition(random_text(1), [random_neighbors(1, 2)], settings)
    drawn.append([cascade.sample(asked, settings, [seed]) for seed in (1, 2, 3)])
plain, replayed = drawn
for one, other in zip(plain, replayed):
    torch.testing.assert_close(one, other, atol=2 / 255, rtol=0)
assert not torch.allclose(replayed[0], replayed[1], atol=0.01)  # no picture was written over by the next
"""


def test_a_compiled_network_draws_the_same_pictures() -> None:
    """In a process without shape checks, which would be compiled too."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
