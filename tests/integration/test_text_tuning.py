"""`radt train tiny` with its text embedded ahead, and then with the text encoder tuned: what the bundle has then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from index.errors import ConfigError
from radt.bundle import changed_files, load_bundle, read_info
from radt.cli import app
from radt.pipeline import TextToImage
from radt.training.run import folder_digest, precompute_text, train
from tests.integration.conftest import tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerator")]


def settings(clip: Path, *more: str) -> list[str]:
    return [*tiny_run(clip), *more]


def test_text_is_embedded_ahead_and_the_encoder_tuned_afterwards(tiny_clip: Path, tmp_path: Path) -> None:
    words = [word for change in settings(tiny_clip) for word in ("--set", change)]
    result = CliRunner().invoke(app, ["train", "tiny", "--out", str(tmp_path), *words, "--precompute-text", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["captions"] > 12
    assert report["bytes_in_pack"] < report["bytes_as_encoded"]
    assert not (tmp_path / "bundle").exists()
    pack = (tmp_path / "pack.safetensors").read_bytes()

    plain = load_bundle(train("tiny", settings(tiny_clip), tmp_path))
    assert (tmp_path / "pack.safetensors").read_bytes() == pack
    tune = settings(tiny_clip, "text_tuning.num_steps=3", "text_tuning.optim.lr=1e-3")
    stages: list[str] = []
    tuned = load_bundle(train("tiny", tune, tmp_path, on_stage=stages.append))
    assert stages == ["training", "tuning the text encoder"]
    assert (plain.info.text_encoder, tuned.info.text_encoder) == (None, "text")
    assert plain.info.digest != tuned.info.digest
    assert changed_files(tuned.folder, tuned.info) == []
    network = tmp_path / "bundle" / "stage0" / "model.safetensors"
    assert all(torch.equal(each, plain.unets[0].state_dict()[name]) for name, each in load_file(network).items())
    asked = ["a wolf on a red background"]
    assert not torch.equal(plain.text_encoder.encode(asked).tokens, tuned.text_encoder.encode(asked).tokens)

    assert folder_digest(tmp_path / "bundle" / "clip") == folder_digest(tiny_clip)  # so the knowledge base still fits
    (picture,) = TextToImage.load(tmp_path / "bundle", kb=tmp_path / "kb", device="cpu")(asked[0])
    assert len(picture.neighbors) == 2
    carried: list[str | None] = []  # while it trains again, too
    again = load_bundle(
        train("tiny", tune, tmp_path, on_stage=lambda _: carried.append(read_info(tmp_path / "bundle").text_encoder))
    )  # over: the same command leaves the same model
    assert carried == ["text", "text"]
    assert again.info.digest == tuned.info.digest

    with pytest.raises(ConfigError, match=r"another text_tuning.seed; delete text_tuning.safetensors in it to tune"):
        train("tiny", [*tune, "text_tuning.seed=1"], tmp_path)
    fast = [f"bundle={tmp_path / 'bundle'}", f"pack_file={tmp_path / 'pack.safetensors'}"]
    with pytest.raises(ConfigError, match=r"was made with another text encoder than .*: leave out pack_file"):
        train("emoji-demo-fast", fast, tmp_path / "fast")


def test_a_network_that_trains_on_gets_an_encoder_tuned_for_it(tiny_clip: Path, tmp_path: Path) -> None:
    tune = settings(
        tiny_clip, "text_tuning.num_steps=2", "text_tuning.optim.lr=1e-3", "text_tuning.optim.warmup_steps=0"
    )
    asked = ["a wolf on a red background"]
    first = load_bundle(train("tiny", tune, tmp_path)).text_encoder.encode(asked)
    told: list[str] = []
    longer = [*tune, "loop.num_steps=3", "text_tuning.save_every=1"]
    second = load_bundle(train("tiny", longer, tmp_path, on_stage=told.append)).text_encoder.encode(asked)
    assert told[1:] == ["tuning the text encoder", "the network was trained further: tuning starts anew"]
    assert not torch.equal(first.tokens, second.tokens)


def test_what_cannot_be_is_one_sentence(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text_tuning is for a first stage"):
        train("tiny", settings(tiny_clip, "text_tuning.num_steps=3", "below=runs/nowhere"), tmp_path)
    with pytest.raises(ConfigError, match="there is no CLIP folder"):
        train("tiny", settings(Path("nowhere"), "text_tuning.num_steps=3"), tmp_path)
    with pytest.raises(ConfigError, match="--precompute-text has no effect"):
        precompute_text("clip-emoji", [], tmp_path)
    with pytest.raises(ConfigError, match="unknown preset"):
        precompute_text("nothing", [], tmp_path)
