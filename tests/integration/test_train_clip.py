"""Training a very small CLIP from end to end: what is saved, resumed, refused, and loaded by open_clip."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from index.errors import ConfigError
from radt.corpora.emoji import Entity, load_entities, select
from radt.training.clip import ClipTrainConfig, to_pixels, train_clip
from radt.training.optim import OptimConfig
from radt.training.tokenizer import encode, load_tokenizer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CONFIG = ClipTrainConfig(
    width=32,
    layers=1,
    heads=2,
    embed_dim=16,
    context_length=16,
    vocab_size=400,
    num_steps=5,
    batch_size=8,
    optim=OptimConfig(lr=1e-2, warmup_steps=1),
    renditions=2,
    log_every=1,
    save_every=2,
)


@pytest.fixture(scope="module")
def entities() -> list[Entity]:
    table = load_entities()
    return [*select(table, "train")[::60], *select(table, "heldout")[::40]]


@pytest.fixture(scope="module")
def finished(entities: list[Entity], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert train_clip(CONFIG, out, entities=entities) == out / "clip"
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same_run(one: Path, two: Path) -> None:
    first, second = load_file(one / "state.safetensors"), load_file(two / "state.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics(one) == metrics(two)


def test_run_writes_what_it_promises(finished: Path) -> None:
    assert [line["step"] for line in metrics(finished)] == [1, 2, 3, 4, 5]
    assert {"images_seen", "loss", "lr", "accuracy"} <= metrics(finished)[0].keys()
    recall = json.loads((finished / "recall.json").read_text())
    assert {f"{split}_by_{form}" for split in ("training", "held_out") for form in ("name", "caption")} < recall.keys()
    assert not list(finished.rglob("*.partial"))


def test_loss_falls(entities: list[Entity], tmp_path: Path) -> None:
    losses: list[float] = []
    config = replace(CONFIG, num_steps=24, optim=OptimConfig(lr=5e-3, warmup_steps=2))
    train_clip(config, tmp_path, entities=entities, on_step=lambda line: losses.append(line["loss"]))
    assert np.mean(losses[-6:]) < np.mean(losses[:3]) - 0.1


def test_killed_run_resumes_to_the_same_bits(finished: Path, entities: list[Entity], tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill_at_step_four(line: dict[str, float]) -> None:
        if line["step"] == 4:
            raise KilledError  # nothing is saved on this way out: the last state is of step 2

    with pytest.raises(KilledError):
        train_clip(CONFIG, tmp_path, entities=entities, on_step=kill_at_step_four)
    assert not (tmp_path / "clip").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the kill came while writing
    seen: list[float] = []
    train_clip(CONFIG, tmp_path, entities=entities, on_step=lambda line: seen.append(line["step"]))
    assert seen == [3, 4, 5]
    assert_same_run(finished, tmp_path)


def test_interrupt_saves_and_the_same_call_goes_on(finished: Path, entities: list[Entity], tmp_path: Path) -> None:
    def interrupt(line: dict[str, float]) -> None:
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_clip(CONFIG, tmp_path, entities=entities, on_step=interrupt)
    seen: list[float] = []
    train_clip(CONFIG, tmp_path, entities=entities, on_step=lambda line: seen.append(line["step"]))
    assert seen == [4, 5]
    assert_same_run(finished, tmp_path)


def test_finished_run_is_left_as_it_is(finished: Path, entities: list[Entity]) -> None:
    before = (finished / "state.safetensors").read_bytes()
    train_clip(CONFIG, finished, entities=entities, on_step=lambda line: pytest.fail(f"trained again: {line}"))
    assert (finished / "state.safetensors").read_bytes() == before


def test_run_of_another_configuration_is_refused(finished: Path, entities: list[Entity]) -> None:
    with pytest.raises(ConfigError, match="batch_size was 8"):
        train_clip(replace(CONFIG, batch_size=4), finished, entities=entities)


def test_open_clip_loads_the_folder_as_its_own(finished: Path) -> None:
    import open_clip

    name = f"local-dir:{finished / 'clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)

    texts = ["Two owls on a blue ground", "wolf", "a word " * 30, ""]
    ids = tokenizer(texts)
    assert ids.tolist() == encode(load_tokenizer(finished / "tokenizer.json"), texts, context_length=16)

    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = preprocess(Image.fromarray(picture))[None]
    torch.testing.assert_close(pixels, to_pixels(torch.from_numpy(picture)[None]))

    trained = load_file(finished / "state.safetensors")
    for weight, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[f"module/{weight}"].half().float(), rtol=0, atol=0)
    with torch.no_grad():
        assert model.encode_image(pixels, normalize=True).shape == (1, 16)
        text_features = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(text_features.norm(dim=1), torch.ones(4))
