"""Two stages of a cascade trained at once, each by its own process and optimiser, and the bundle that joins them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from index.errors import ConfigError
from radt.bundle import read_info
from radt.pipeline import TextToImage
from radt.training.run import train
from tests.integration.conftest import copy_bundle, tiny_run

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

ROOT = Path(__file__).parents[2]


def settings(clip: Path, *more: str) -> list[str]:
    return [*tiny_run(clip, entities=4, scenes=8), *more]


def start(out: Path, overrides: list[str]) -> subprocess.Popen[str]:
    words = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "radt.cli", "train", "tiny", "--out", str(out), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_stages_train_at_once_and_their_bundle_joins_them(tiny_clip: Path, tmp_path: Path) -> None:
    base, sr = tmp_path / "base", tmp_path / "sr"
    below = f"below={base / 'bundle'}"
    of_base = settings(tiny_clip, "optim.name=adafactor", "unet.image_size=16")
    of_sr = settings(tiny_clip, "optim.name=adam", "unet.image_size=32", "unet.low_res_size=16", below)
    both = [start(base, of_base), start(sr, of_sr)]
    for process in both:
        _, said = process.communicate(timeout=280)
        assert process.returncode == 0, said
    slots = {out: {name.rpartition(".")[2] for name in load_file(out / "state.safetensors")} for out in (base, sr)}
    assert {"row_var", "col_var"} <= slots[base]
    assert {"exp_avg", "exp_avg_sq"} <= slots[sr]

    state = (sr / "state.safetensors").read_bytes()
    bundle = train("tiny", of_sr, sr)  # trained, so this only leaves the bundle, with whatever lies below now
    assert (sr / "state.safetensors").read_bytes() == state
    assert [stage.name for stage in read_info(bundle).stages] == ["stage0", "stage1"]
    for stage, out in (("stage0", base), ("stage1", sr)):
        averaged, kept = load_file(out / "state.safetensors"), load_file(bundle / stage / "model.safetensors")
        assert all(torch.equal(kept[name], averaged[f"ema/{name}"]) for name in kept)
    (picture,) = TextToImage.load(bundle, device="cpu")("a wolf", steps=1, sr_steps=1)
    assert picture.image.size == (32, 32)


@pytest.mark.slow
def test_a_stage_whose_stages_below_are_not_there_yet_trains_and_says_so(tiny_clip: Path, tmp_path: Path) -> None:
    told: list[str] = []
    overrides = settings(tiny_clip, "unet.image_size=32", "unet.low_res_size=16", f"below={tmp_path / 'not-yet'}")
    bundle = train("tiny", overrides, tmp_path / "sr", on_stage=told.append)
    assert not bundle.exists()
    assert told[-1] == f"trained, and no bundle yet: run this again when the stages below lie in {tmp_path / 'not-yet'}"
    assert json.loads((tmp_path / "sr" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_stages_of_another_text_encoder_are_not_joined(
    tiny_clip: Path, other_clip: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    overrides = settings(other_clip, "unet.image_size=16", "unet.low_res_size=8", f"below={tiny_bundle}")
    with pytest.raises(ConfigError, match=f"trained with another CLIP .*--set clip={tiny_bundle / 'clip'}, or"):
        train("tiny", overrides, tmp_path / "sr")
    assert not (tmp_path / "sr").exists()  # nothing was begun


def test_stages_of_another_size_are_not_drawn_over(tiny_clip: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    overrides = settings(tiny_clip, "unet.image_size=16", "unet.low_res_size=4", f"below={tiny_bundle}")
    with pytest.raises(ConfigError, match="none what is drawn over here"):
        train("tiny", overrides, tmp_path / "sr")
    assert not (tmp_path / "sr").exists()


def test_stages_below_that_read_prompts_by_a_text_encoder_of_their_own_are_not_joined(
    tiny_clip: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    below = copy_bundle(tiny_bundle, tmp_path / "below")
    info = json.loads((below / "bundle.json").read_text())
    (below / "bundle.json").write_text(json.dumps({**info, "text_encoder": "text"}))
    (below / "text").mkdir()
    (below / "text" / "config.json").write_text("{}")
    overrides = settings(tiny_clip, "unet.image_size=16", "unet.low_res_size=8", f"below={below}")
    with pytest.raises(
        ConfigError, match=f"trained with another text encoder .*--set text_encoder={below / 'text'}, or"
    ):
        train("tiny", overrides, tmp_path / "sr")
