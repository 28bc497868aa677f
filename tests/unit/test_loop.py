"""The training loop on a pack of noise: killed, interrupted or made longer, a run is bit for bit the unbroken one."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from index.errors import ConfigError
from radt.diffusion.schedule import NoiseSchedule
from radt.resizing import resize
from radt.training.checkpoint import CheckpointError
from radt.training.data import DataConfig, draw_batch
from radt.training.loop import LoopConfig, Objective, Run, bend, step_generator
from radt.training.metrics import append_metrics, forget_after
from radt.training.optim import OptimConfig
from radt.unet.unet import UNet
from tests.networks import generator, small_config
from tests.packs import small_pack

STEPS = 6
LOOP = LoopConfig(num_steps=STEPS, save_every=2, log_every=1, precision="no")
OBJECTIVE = Objective(schedule=NoiseSchedule())


class KilledError(Exception):
    """Stands for SIGKILL: nothing is saved on the way out."""


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for a whole process, and refuses others."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_run(out: Path, loop: LoopConfig = LOOP, **changes: Any) -> Run:
    torch.manual_seed(loop.seed)
    config = small_config(channels=(16, 32), blocks=(1, 1), attention_levels=(1,), encoder_neighbor_levels=(1,))
    settings: dict[str, Any] = {
        "data": DataConfig(batch_size=3),
        "optim": OptimConfig(lr=3e-3, warmup_steps=2),
        "objective": OBJECTIVE,
    }
    return Run(UNet(config), small_pack(), out, loop=loop, **(settings | changes))


def stop_at(step: int, how: Callable[[], None]) -> Callable[[dict[str, float]], None]:
    def on_step(metrics: dict[str, float]) -> None:
        if metrics["step"] == step:
            how()

    return on_step


def kill() -> None:
    raise KilledError


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same_run(one: Path, two: Path) -> None:
    first, second = load_file(one / "state.safetensors"), load_file(two / "state.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics(one) == metrics(two)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    make_run(out).train()
    return out


def test_a_run_logs_and_saves(unbroken: Path) -> None:
    logged = metrics(unbroken)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert [line["images_seen"] for line in logged] == [3, 6, 9, 12, 15, 18]
    assert logged[0]["lr"] == 1.5e-3
    assert all(line["grad_norm"] > 0 for line in logged)
    state = load_file(unbroken / "state.safetensors")
    assert {name.split("/")[0] for name in state} == {"network", "ema", "optimizer"}
    assert not torch.equal(state["network/conv_out.weight"], state["ema/conv_out.weight"])
    assert sorted(path.name for path in unbroken.iterdir()) == ["metrics.jsonl", "state.safetensors"]


def test_the_same_run_twice_is_the_same(unbroken: Path, tmp_path: Path) -> None:
    make_run(tmp_path).train()
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_resumes_to_the_same_bits(unbroken: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(KilledError):
        make_run(tmp_path).train(on_step=stop_at(step, kill))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # the kill came while writing
    again = make_run(tmp_path)
    assert again.step == (step - 1) // 2 * 2  # the last one saved
    again.train()
    assert_same_run(unbroken, tmp_path)


def test_ctrl_c_saves_and_goes_on_up(unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path).train(on_step=stop_at(3, press_ctrl_c))
    again = make_run(tmp_path)
    assert again.step == 3
    again.train()
    assert_same_run(unbroken, tmp_path)


def test_ctrl_c_within_a_step_does_not_cut_it_in_two(unbroken: Path, tmp_path: Path) -> None:
    """Wherever it comes, here between the forward and the backward pass."""
    run = make_run(tmp_path)
    hook = run.network.register_forward_hook(lambda *_: press_ctrl_c() if run.step == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    hook.remove()
    assert make_run(tmp_path).step == 3
    make_run(tmp_path).train()
    assert_same_run(unbroken, tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_stopped_before_its_cool_down_may_be_made_longer(tmp_path: Path) -> None:
    longer = replace(LOOP, num_steps=10)
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "one").train(on_step=stop_at(4, press_ctrl_c))
    make_run(tmp_path / "one", longer).train()
    make_run(tmp_path / "two", longer).train()
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_saving_more_often_changes_nothing(unbroken: Path, tmp_path: Path) -> None:
    saved = []
    make_run(tmp_path, replace(LOOP, save_every=1)).train(on_save=lambda run: saved.append(run.step))
    assert saved == [1, 2, 3, 4, 5, 6]
    assert_same_run(unbroken, tmp_path)


def test_a_run_that_is_over_only_leaves_its_model(unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes((unbroken / "state.safetensors").read_bytes())
    saved, steps = [], []
    make_run(tmp_path).train(on_save=lambda run: saved.append(run.step), on_step=steps.append)
    assert (saved, steps) == ([STEPS], [])


def test_a_broken_state_is_one_sentence(unbroken: Path, tmp_path: Path) -> None:
    whole = (unbroken / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="delete it to start this run again"):
        make_run(tmp_path)


def test_the_loss_falls(tmp_path: Path) -> None:
    losses: list[float] = []
    run = make_run(tmp_path, replace(LOOP, num_steps=60, save_every=60), data=DataConfig(batch_size=16))
    run.train(on_step=lambda line: losses.append(line["loss"]))
    assert sum(losses[-10:]) < 0.92 * sum(losses[:10])  # of noise there is little to learn


def test_half_precision_is_of_the_forward_pass_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, replace(LOOP, precision="bf16", num_steps=2))
    seen: set[torch.dtype] = set()
    run.network.conv_out.register_forward_hook(lambda _module, _args, out: seen.add(out.dtype))
    run.train()
    assert seen == {torch.bfloat16}
    state = load_file(tmp_path / "state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_loss_of_a_network_that_answers_zero_is_the_mean_square_of_what_it_should_answer() -> None:
    batch = draw_batch(small_pack(), DataConfig(batch_size=200), generator())
    network = UNet(
        small_config(
            channels=(16,), blocks=(1,), attention_levels=(), encoder_neighbor_levels=(0,), decoder_neighbor_levels=()
        )
    )
    means = {
        "eps": 1.0,
        "x0": batch.x0.square().mean().item(),
        "v": (1 + batch.x0.square().mean().item()) / 2,  # alpha^2 and sigma^2 average 1/2 over the cosine schedule
    }
    for prediction, mean in means.items():
        objective = Objective(schedule=NoiseSchedule(), prediction=prediction, weighting=prediction)
        with torch.no_grad():
            loss = objective.loss(network, batch, generator(1))
        assert loss.item() == pytest.approx(mean, rel=0.03)


def test_every_step_of_every_process_draws_by_itself() -> None:
    def first(seed: int, step: int, rank: int) -> float:
        return torch.rand(1, generator=step_generator(seed, step, rank, device=torch.device("cpu"))).item()

    draws = {(s, i, r): first(s, i, r) for s in range(3) for i in range(12) for r in range(2)}
    assert len(set(draws.values())) == len(draws)
    assert all(first(*which) == value for which, value in draws.items())


def test_metrics_of_lost_steps_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    forget_after(path, 3)
    assert not path.exists()
    for step in range(1, 6):
        append_metrics(path, {"step": step, "loss": 0.5})
    forget_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("changes", [{"num_steps": 0}, {"save_every": 0}, {"log_every": -1}, {"ema_decay": 1.1}])
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        LoopConfig(**changes)


@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_bending_shifts_every_pixel_smoothly_and_by_no_more_than_it_may(size: tuple[int, int]) -> None:
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    ramps = torch.stack([rows, columns, torch.zeros_like(rows)]).expand(20, 3, height, width) / 32 - 0.5
    bent = bend(ramps, 1.5, generator())
    shift = 32 * (bent - ramps)[:, :2, 3:-3, 3:-3]  # a pixel's own place is its colour; edges repeat
    assert (shift.abs() < 1.5 + 1e-3).all()
    assert shift.abs().amax(dim=(1, 2, 3)).max() > 0.9
    assert shift.abs().amax(dim=(1, 2, 3)).min() < 0.5  # each picture by another strength
    assert (shift.diff(dim=-1).abs() < 1.5).all()  # nothing is folded over
    torch.testing.assert_close(bent[:, 2], ramps[:, 2])  # what is even stays so
    torch.testing.assert_close(bend(ramps, 0.0, generator()), ramps, rtol=0, atol=1e-5)


def test_what_is_drawn_over_is_bent_only_where_that_is_asked_for() -> None:
    network = UNet(small_config(image_size=32, low_res_size=16))
    x0 = torch.rand(4, 3, 32, 32, generator=generator()) * 2 - 1
    plain, bent = (
        replace(OBJECTIVE, augmentation=0.0, warp=warp).draw_low_res(network, x0, generator()) for warp in (0.0, 2.0)
    )
    assert plain is not None
    assert bent is not None
    torch.testing.assert_close(plain.pixels, resize(resize(x0, (16, 16)), (32, 32)), rtol=0, atol=1e-3)
    assert (bent.pixels - plain.pixels).abs().amax() > 0.1
