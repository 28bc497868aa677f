"""`radt train emoji-demo-fast` from a bundle and a pack to `radt generate --fast`, at both kinds of stage."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from index.cli import run
from index.errors import ConfigError, ModelError
from radt.bundle import CLIP_FOLDER, StageInfo, changed_files, load_bundle, read_info, write_bundle
from radt.cli import app
from radt.neighbors import Reference
from radt.pipeline import TextToImage
from radt.provenance import read_png, replay
from radt.text_encoder import load_text_encoder
from radt.training.pack import Pack, TextTable
from radt.training.run import folder_digest, train
from radt.unet.unet import UNet
from tests.fakes import draw
from tests.integration.conftest import copy_bundle, save_tiny_bundle
from tests.networks import IMAGE_SIZE, randomize
from tests.packs import NUM_PICTURES, NUM_SCENES, small_pack

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PRESET = "emoji-demo-fast"
REFERENCE = Reference(image=draw(0), caption="a red circle")


def save_pack(path: Path, clip: Path, *, times: int = 1, wider: int = 1, **facts: str) -> Path:
    """A pack of noise with this CLIP's embeddings, its pictures `times` as large and `wider` still."""
    encoder, pack = load_text_encoder(clip, None), small_pack()

    def embed(what: str, count: int) -> TextTable:
        return TextTable.from_conditions([encoder.encode([f"{what} {number}" for number in range(count)])])

    pack = replace(
        pack,
        layers=pack.layers.repeat_interleave(times, 1).repeat_interleave(times * wider, 2),
        pictures=pack.pictures.repeat_interleave(times, 1).repeat_interleave(times * wider, 2),
        scene_text=embed("scene", NUM_SCENES),
        picture_text=embed("picture", NUM_PICTURES),
    )
    pack.save(path, {"clip": folder_digest(clip), **facts})
    return path


@pytest.fixture(scope="module")
def teacher(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bundle(tmp_path_factory.mktemp("teacher") / "bundle", tiny_clip, image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def pack(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pack(tmp_path_factory.mktemp("pack") / "pack.safetensors", teacher / CLIP_FOLDER)


def settings(bundle: Path, pack: Path, *more: str) -> list[str]:
    return [
        f"bundle={bundle}",
        f"pack_file={pack}",
        "data.batch_size=2",
        "loop.num_steps=3",
        "loop.save_every=2",
        "loop.log_every=1",
        "loop.precision=no",
        "halving_updates=2",
        "first_steps=4",
        "steps=2",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(teacher: Path, pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run: guidance, then 4 steps halved to 2."""
    out = tmp_path_factory.mktemp("run") / "fast"
    said: list[str] = []
    assert train(PRESET, settings(teacher, pack), out, on_stage=said.append) == out / "bundle"
    assert said == ["distilling: guided", "distilling: 2-steps"]
    return out


def test_a_run_leaves_a_bundle_with_the_twin_beside_the_stage(finished: Path, teacher: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["2-steps", "bundle", "config.json", "guided"]
    bundle = load_bundle(finished / "bundle")
    assert not changed_files(finished / "bundle", bundle.info)
    twin = bundle.info.stages[0].fast
    assert twin is not None
    assert (twin.name, twin.steps, twin.highest_guidance) == ("stage0-fast", 2, 4.0)
    before, after = (load_file(folder / "stage0" / "model.safetensors") for folder in (teacher, finished / "bundle"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    averaged = load_file(finished / "2-steps" / "state.safetensors")
    kept = load_file(finished / "bundle" / "stage0-fast" / "model.safetensors")
    assert all(torch.equal(kept[name], averaged[f"ema/{name}"].half()) for name in kept)
    lines = [json.loads(line) for line in (finished / "guided" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_generate_fast_takes_few_steps_of_one_row_and_can_be_replayed(finished: Path, tmp_path: Path) -> None:
    model = TextToImage.load(finished / "bundle", device="cpu")
    steps: list[tuple[int, int]] = []
    picture = model("a wolf", fast=True, references=[REFERENCE], on_step=lambda *done: steps.append(done))[0]
    assert steps == [(1, 2), (2, 2)]
    path = picture.save(tmp_path / "wolf.png")
    recorded = read_png(path)[1].settings
    assert (recorded.fast, recorded.steps, recorded.sampler) == (True, 2, "ddim")
    assert replay(path, finished / "bundle").identical
    plain = model("a wolf", references=[REFERENCE])[0]
    assert plain.image.tobytes() != picture.image.tobytes()
    assert (
        plain.image.tobytes()
        == TextToImage.load(finished / "bundle", device="cpu")("a wolf", fast=False, references=[REFERENCE])[
            0
        ].image.tobytes()
    )


def test_the_attention_in_the_record_is_the_twins_own(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextToImage.load(finished / "bundle", device="cpu")
    asked: list[int] = []
    for number, unet in enumerate((model.bundle.unets[0], model.bundle.twins[0])):
        assert unet is not None
        mass = unet.attention_mass
        monkeypatch.setattr(
            unet, "attention_mass", lambda *a, mass=mass, number=number, **k: asked.append(number) or mass(*a, **k)
        )
    model("a wolf", fast=True, references=[REFERENCE])
    model("a wolf", references=[REFERENCE])
    assert asked == [1, 0]


def test_a_stage_above_a_stage_with_a_twin_leaves_a_whole_bundle(finished: Path, tmp_path: Path) -> None:
    below = load_bundle(finished / "bundle")
    config = below.unets[0].config
    above = replace(config, image_size=2 * config.image_size, low_res_size=config.image_size)
    out = tmp_path / "joined"
    write_bundle(
        out,
        name="joined",
        clip=finished / "bundle" / "clip",
        unets=[UNet(above)],
        stages=[StageInfo(name="stage1")],
        below=finished / "bundle",
    )
    joined = load_bundle(out)
    assert not changed_files(out, joined.info)
    assert [stage.name for stage in joined.info.stages] == ["stage0", "stage1"]
    assert joined.twins[0] is not None


def test_of_the_stages_below_come_those_up_to_the_one_drawn_over(finished: Path, tmp_path: Path) -> None:
    side = load_bundle(finished / "bundle").unets[0].config.image_size

    def leave(name: str, below: Path, low_res_size: int) -> tuple[str, ...]:
        first = load_bundle(finished / "bundle").unets[0].config
        above = replace(first, image_size=2 * low_res_size, low_res_size=low_res_size)
        stages = [StageInfo(name=name)]
        clip = finished / "bundle" / "clip"
        info = write_bundle(tmp_path / name, name=name, clip=clip, unets=[UNet(above)], stages=stages, below=below)
        return tuple(stage.name for stage in info.stages)

    assert leave("two", finished / "bundle", side) == ("stage0", "two")
    assert leave("three", tmp_path / "two", 2 * side) == ("stage0", "two", "three")
    assert leave("other", tmp_path / "three", side) == ("stage0", "other")
    with pytest.raises(ConfigError, match="none what is drawn over here"):
        leave("none", tmp_path / "three", side // 2)


def test_guidance_is_an_input_and_pictures_do_not_depend_on_their_batch(finished: Path) -> None:
    model = TextToImage.load(finished / "bundle", device="cpu")
    alone, second = (model("a wolf", fast=True, seed=seed)[0] for seed in (3, 4))
    both = model("a wolf", fast=True, seed=3, n=2)
    assert [each.image.tobytes() for each in both] == [alone.image.tobytes(), second.image.tobytes()]


def test_the_command_line_has_the_switch(
    finished: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = tmp_path / "init.png"
    draw(1).save(init)

    def generate(model: Path, *more: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run(app, ["generate", "a wolf", "--model", str(model), "--fast", "--out", str(tmp_path), "--json", *more])
        return exit_.value.code, *capsys.readouterr()

    code, out, _ = generate(finished / "bundle")
    assert (code, json.loads(out)["images"][0]["settings"]["steps"]) == (0, 2)
    code, _, error = generate(finished / "bundle", "--init-image", str(init))
    assert (code, error.count("\n")) == (1, 1)
    assert "a fast twin of few steps starts from noise alone" in error
    code, _, error = generate(teacher)
    assert code == 1
    assert "no fast twin: leave out --fast" in error
    assert error.count("\n") == 1


def test_the_same_command_again_halves_further_when_fewer_steps_are_asked_for(
    finished: Path, teacher: Path, pack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fast"
    shutil.copytree(finished, out)
    state = (out / "2-steps" / "state.safetensors").read_bytes()
    bundle = train(PRESET, settings(teacher, pack, "steps=1"), out)
    assert (out / "2-steps" / "state.safetensors").read_bytes() == state
    twin = read_info(bundle).stages[0].fast
    assert twin is not None
    assert twin.steps == 1


def test_an_interrupted_run_ends_where_an_unbroken_one_does(
    finished: Path, teacher: Path, pack: Path, tmp_path: Path
) -> None:
    """Cut off in its second phase, whose first update of two was saved."""

    def interrupt(metrics: dict[str, float], seen: list[int] = []) -> None:  # noqa: B006 - the count of one test
        seen.append(1)
        if len(seen) == 3 + 2:
            raise KeyboardInterrupt

    more = settings(teacher, pack, "loop.save_every=1")
    with pytest.raises(KeyboardInterrupt):
        train(PRESET, more, tmp_path / "fast", on_step=interrupt)
    train(PRESET, more, tmp_path / "fast")
    one, two = (load_file(folder / "2-steps" / "state.safetensors") for folder in (finished, tmp_path / "fast"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_super_resolution_stage_gets_a_twin_too(teacher: Path, tmp_path: Path) -> None:
    """The stage below keeps its own sampler and steps; the twin above takes two."""
    config = replace(load_bundle(teacher).unets[0].config, image_size=2 * IMAGE_SIZE, low_res_size=IMAGE_SIZE)
    unet = UNet(config)
    randomize(unet, scale=0.1)
    cascade = tmp_path / "cascade"
    write_bundle(
        cascade,
        name="cascade",
        clip=teacher / CLIP_FOLDER,
        unets=[unet],
        stages=[StageInfo(name="stage1")],
        sampling=replace(read_info(teacher).sampling, sr_steps=3),
        below=teacher,
    )
    pack = save_pack(tmp_path / "pack.safetensors", teacher / CLIP_FOLDER, times=2)
    bundle = train(PRESET, settings(cascade, pack, "stage=1", "loop.num_steps=1"), tmp_path / "fast")
    model = TextToImage.load(bundle, device="cpu")
    settled = model.settings(fast=True)
    assert (settled.steps, settled.sampler, settled.sr_steps) == (3, "dpmpp_2m", 2)
    picture = model("a wolf", fast=True, references=[REFERENCE])[0]
    assert picture.image.size == (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    with pytest.raises(ConfigError, match="no fast twin"):
        model("a wolf", fast=True, stages=1)


def test_mistakes_are_one_sentence(finished: Path, teacher: Path, pack: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="started with another highest_guidance; choose another --out"):
        train(PRESET, settings(teacher, pack, "highest_guidance=2"), finished)
    with pytest.raises(ConfigError, match=r"stage 1 was asked for and .* has stages 0 to 0"):
        train(PRESET, settings(teacher, pack, "stage=1"), tmp_path)
    with pytest.raises(ModelError, match=r"bundle\.json"):
        train(PRESET, settings(tmp_path / "nothing", pack), tmp_path)
    other = save_pack(tmp_path / "other.safetensors", teacher / CLIP_FOLDER, times=2)
    with pytest.raises(ConfigError, match=r"pictures are 32x32 and the network draws 16x16: change unet$"):
        train(PRESET, settings(teacher, other), tmp_path / "fast")
    wide = save_pack(tmp_path / "wide.safetensors", teacher / CLIP_FOLDER, wider=2)
    with pytest.raises(ConfigError, match="pictures are 16x32 and the network draws 16x16"):
        train(PRESET, settings(teacher, wide), tmp_path / "fast")
    assert isinstance(Pack.load(pack), Pack)


def test_a_pack_of_another_text_encoder_is_refused_where_it_says_so(teacher: Path, pack: Path, tmp_path: Path) -> None:
    tuned = copy_bundle(teacher, tmp_path / "tuned")
    info = json.loads((tuned / "bundle.json").read_text())
    (tuned / "bundle.json").write_text(json.dumps({**info, "text_encoder": "text"}))
    shutil.copytree(tuned / CLIP_FOLDER, tuned / "text")
    untuned = save_pack(tmp_path / "pack.safetensors", teacher / CLIP_FOLDER, text_encoder="")
    with pytest.raises(ConfigError, match=r"was made with another text encoder than .*text: leave out pack_file"):
        train(PRESET, settings(tuned, untuned), tmp_path / "fast")
    short = ("steps=null", "loop.num_steps=1")
    train(PRESET, settings(teacher, untuned, *short), tmp_path / "same")
    train(PRESET, settings(tuned, pack, *short), tmp_path / "old")  # a pack of an older version does not say
