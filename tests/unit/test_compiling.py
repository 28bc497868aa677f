"""Steps that nothing waits in, and networks that can be compiled whole."""

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from index.errors import ConfigError
from radt.compiling import check_compiler, prepare
from radt.conditioning import Condition, map_tensors
from radt.diffusion.denoiser import Denoiser
from radt.diffusion.guidance import guided, mix
from radt.diffusion.samplers import SAMPLERS
from radt.diffusion.schedule import NoiseSchedule
from radt.pipeline import TextToImage
from radt.unet.unet import UNet
from tests.networks import random_neighbors, random_pixels, random_text, random_unet, small_config

SCHEDULE, STEPS, B = NoiseSchedule(), 4, 2


class NothingWaits(TorchDispatchMode):
    """Fails where a device's queue would have to be emptied: a copy from or to the host. The device is `meta`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each.device.type for each in args if isinstance(each, Tensor) and each.ndim]
        made = [each.device.type for each in (out,) if isinstance(each, Tensor)]
        if len({*given, *made}) > 1:
            raise AssertionError(f"{func} copies between {given} and {made}")
        return out


def test_the_watchman_sees_copies_and_questions() -> None:
    x = torch.ones(3, device="meta")
    with NothingWaits():
        x * 2 + torch.zeros(3, device="meta")
        with pytest.raises(AssertionError, match="copies between"):
            torch.ones(3).to("meta")
        with pytest.raises(RuntimeError, match="meta tensors"):
            bool((x == 1).all())


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddim", "heun"])
@pytest.mark.parametrize("branch", ["text", "joint"])
def test_a_step_waits_for_nothing(name: str, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance, network and sampler on a device without numbers: whoever wanted to see one would fail."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())  # which that device does not have
    with torch.device("meta"):
        unet = UNet(small_config()).eval()
    text = map_tensors(lambda tensor: tensor.to("meta"), random_text(B))
    batch = map_tensors(lambda tensor: tensor.to("meta"), random_neighbors(B, 2))
    condition = Condition(text=text, neighbors=unet.project_neighbors(batch))
    weights = {"text_guidance": 3.0, "neighbor_guidance": 2.0}
    plans = [tuple(mix(branch if step % 2 else "neighbor", **weights) for step in range(STEPS)) for _ in range(B)]
    denoise = guided(Denoiser(unet, schedule=SCHEDULE, prediction="v"), condition, plans)
    steps = []
    x = torch.empty(B, 3, *unet.config.size, device="meta")

    def watched(x: Tensor, t: float, step: int) -> Tensor:
        steps.append(step)
        with NothingWaits():
            return denoise(x, t, step)

    times = SCHEDULE.time_steps(STEPS)
    out = SAMPLERS[name](watched, x, times, schedule=SCHEDULE, generators=[torch.Generator()] * B, branches=plans)
    assert out.shape == x.shape
    assert set(steps) == set(range(STEPS))


def test_the_sampler_copies_its_plan_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from radt.diffusion import samplers

    asked: list[str] = []
    before = samplers.same_branch
    monkeypatch.setattr(samplers, "same_branch", lambda *given: asked.append("plan") or before(*given))
    plans = [(mix("text", text_guidance=2.0, neighbor_guidance=2.0),) * STEPS]

    def denoise(x: Tensor, t: float, step: int) -> Tensor:
        asked.append("step")
        return x

    SAMPLERS["dpmpp_2m"](
        denoise, random_pixels(1), SCHEDULE.time_steps(STEPS), schedule=SCHEDULE, generators=[], branches=plans
    )
    assert asked == ["plan"] * STEPS + ["step"] * STEPS


# Preparing


def test_uncompiled_on_a_cpu_a_network_stays_as_it_is() -> None:
    unet = random_unet()
    strides = [parameter.stride() for parameter in unet.parameters()]
    assert prepare(unet, device="cpu") is unet
    assert [parameter.stride() for parameter in unet.parameters()] == strides


def test_channels_last_is_a_layout_and_nothing_else() -> None:
    x, t, text = random_pixels(B), torch.tensor([0.2, 0.7]), random_text(B)
    plain, laid_out = random_unet(), prepare(random_unet(), device="cuda")  # moves nothing: the layout alone
    kernel = laid_out.get_parameter("conv_out.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    batch = random_neighbors(B, 2)
    with torch.inference_mode():
        ours = laid_out(x, t, text, laid_out.project_neighbors(batch))
        torch.testing.assert_close(ours, plain(x, t, text, plain.project_neighbors(batch)), atol=1e-4, rtol=1e-4)


def test_without_a_compiler_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="compiling needs a C"):
        check_compiler()
    with pytest.raises(ConfigError, match="compiling needs a C"):
        prepare(random_unet(), device="cpu", compiled=True)


def test_loading_prepares_every_network_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "radt.pipeline.prepare", lambda unet, *, device, compiled: asked.append((device, compiled)) or unet
    )
    compiled = TextToImage.load(device="cpu", compile=True)
    assert compiled.origin().compiled
    bundle = compiled.bundle
    networks = len([unet for unet in (*bundle.unets, *bundle.twins) if unet])
    assert asked == [("cpu", True)] * networks
    assert not TextToImage.load(device="cpu").origin().compiled
    assert asked[networks:] == [("cpu", False)] * networks


WHOLE = """
import torch
from radt.conditioning import map_tensors
from tests.networks import random_neighbors, random_pixels, random_text, random_unet

unet = random_unet(
    channels=(16, 16), blocks=(1, 1), attention_levels=(1,), encoder_neighbor_levels=(1,), decoder_neighbor_levels=(0,)
)
x, t, text = random_pixels(2), torch.tensor([0.2, 0.7]), random_text(2)
with torch.inference_mode():
    kept = unet.project_neighbors(random_neighbors(2, 2))
    expected = unet(x, t, text, kept)
    unet.compile(dynamic=False, fullgraph=True, backend="eager")
    assert torch.equal(unet(x, t, text, kept), expected)
"""


@pytest.mark.slow
def test_the_network_is_one_graph() -> None:
    """No break, hence nothing that Python would have to look at in a step; in a process without shape checks."""
    done = subprocess.run([sys.executable, "-c", WHOLE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
