"""`radt explain` and `radt generate --max-copy`, from the command line to the files they leave."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from index.cli import run
from index.errors import ModelError, UserError
from radt.bundle import StageInfo, load_bundle, write_bundle
from radt.cli import app
from radt.explain import TIMES, explain_file
from radt.explain_sheet import make_sheet
from radt.pipeline import TextToImage
from radt.provenance import read_png
from radt.settings import GenerateSettings
from radt.unet.unet import UNet
from tests.integration.conftest import save_tiny_bundle

PROMPT = "a red circle"
REDRAWS = 2  # fewer than for users, for they take time


@pytest.fixture
def radt(capsys, monkeypatch, tmp_path, tiny_bundle, tiny_kb):
    """Run a command line in an empty folder, by the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("radt.generate.MAX_REDRAWS", REDRAWS)

    def call(*words):
        kb = ["--kb", str(tiny_kb)] if words[0] == "generate" else []
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(app, [*map(str, words), "--model", str(tiny_bundle), *kb])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def two_stages(tiny_bundle, tiny_clip, tmp_path_factory):
    """The tiny model, and a stage that draws over its pictures at twice their size."""
    folder = tmp_path_factory.mktemp("bundles") / "two"
    first = load_bundle(tiny_bundle).unets[0]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        second = UNet(replace(first.config, image_size=16, low_res_size=8))
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    stages = [StageInfo(name="base"), StageInfo(name="larger")]
    sampling = GenerateSettings(steps=2, sr_steps=1)
    write_bundle(folder, name="two", clip=tiny_clip, unets=[first, second], stages=stages, sampling=sampling)
    return folder


def draw_one(model, kb, path, **settings):
    (picture,) = TextToImage.load(model, kb=kb, device="cpu")(PROMPT, **settings)
    return picture.save(path)


def test_explain_leaves_a_sheet_and_says_where_the_picture_comes_from(radt, tmp_path):
    _, out, _ = radt("generate", PROMPT, "-k", 2, "--json")
    (image,) = json.loads(out)["images"]
    code, out, err = radt("explain", image["path"])
    assert (code, err) == (0, "")
    for neighbor in image["neighbors"]:
        assert neighbor["id"] in out
        assert neighbor["caption"] in out
    assert "licence CC0" in out
    assert "source unknown" in out
    sheet = Path(image["path"]).with_suffix(".explain.png")
    assert str(sheet) in out.splitlines()
    with Image.open(sheet) as page:
        assert min(page.size) > 500
    assert "licence CC0" in sheet.with_suffix(".html").read_text()


def test_the_document_has_the_shares_the_maps_and_the_records_own_facts(radt, tmp_path):
    _, out, _ = radt("generate", PROMPT, "-k", 2, "--json")
    (image,) = json.loads(out)["images"]
    code, out, _ = radt("explain", image["path"], "--out", tmp_path / "deep" / "why.png", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["prompt"], document["seed"], document["times"]) == (PROMPT, 0, list(TIMES))
    assert document["copy_similarity"] == image["copy_similarity"]
    for neighbor, as_drawn in zip(document["neighbors"], image["neighbors"], strict=True):
        assert neighbor.pop("copy")["similarity"] == as_drawn["similarity"]
        assert neighbor == as_drawn
    (stage,) = document["stages"]
    shares = [neighbor["attention"] for neighbor in stage["neighbors"]]
    assert stage["unclaimed"] + sum(shares) == pytest.approx(1, abs=1e-3)
    for neighbor in stage["neighbors"]:
        for name in ("picture", "neighbor"):
            cells = np.array(neighbor[name])
            assert cells.shape == (8, 8)
            assert cells.mean() == pytest.approx(neighbor["attention"], abs=1e-3)
    assert Path(document["sheet"]).is_file()
    assert Path(document["page"]).is_file()


def test_every_stage_is_explained_at_its_own_size(two_stages, tiny_kb, tmp_path):
    path = draw_one(two_stages, tiny_kb, tmp_path / "x.png", k=3)
    explanation = explain_file(path, two_stages)
    assert [(stage.name, stage.size) for stage in explanation.stages] == [("base", (8, 8)), ("larger", (16, 16))]
    for stage in explanation.stages:
        means = torch.stack([stage.picture.mean(dim=(1, 2)), stage.neighbor.mean(dim=(1, 2))])
        torch.testing.assert_close(means[0], means[1])
        assert means[0].sum() < 1
        assert (means[0] > 0).all()
    columns = make_sheet(explanation).columns
    assert columns[1:] == ("8x8: looked from", "8x8: looked at", "16x16: looked from", "16x16: looked at")
    again = explain_file(path, two_stages)
    for one, two in zip(explanation.stages, again.stages, strict=True):
        assert torch.equal(one.picture, two.picture)


def test_a_request_of_fewer_stages_explains_those(two_stages, tiny_kb, tmp_path):
    path = draw_one(two_stages, tiny_kb, tmp_path / "x.png", stages=1)
    assert [stage.name for stage in explain_file(path, two_stages).stages] == ["base"]


def test_what_cannot_be_explained_is_one_sentence(tiny_bundle, tiny_clip, tiny_kb, tmp_path):
    with pytest.raises(UserError, match="text alone"):
        explain_file(draw_one(tiny_bundle, tiny_kb, tmp_path / "alone.png", k=0), tiny_bundle)
    other = save_tiny_bundle(tmp_path / "other", tiny_clip, seed=1)
    with pytest.raises(ModelError, match="was drawn by model"):
        explain_file(draw_one(tiny_bundle, tiny_kb, tmp_path / "x.png"), other)
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    with pytest.raises(UserError, match="carries no record"):
        explain_file(tmp_path / "foreign.png", tiny_bundle)


@pytest.mark.parametrize("out", ["wolf.png", "wolf.html", "wolf", "../wolf.v2/link.png"])
def test_a_sheet_never_replaces_the_picture_it_explains(tmp_path, capsys, monkeypatch, out):
    folder = tmp_path / "wolf.v2"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Image.new("RGB", (8, 8)).save("wolf.png")
    Path("link.png").symlink_to("wolf.png")
    before = Path("wolf.png").read_bytes()
    with pytest.raises(SystemExit):
        run(app, ["explain", "wolf.png", "--out", out])
    assert capsys.readouterr().err == (
        "error: the sheet would be written over 'wolf.png' itself: give --out another name\n"
    )
    assert Path("wolf.png").read_bytes() == before


def similarity_by_seed(radt, *seeds):
    _, out, _ = radt("generate", PROMPT, "--seed", seeds[0], "-n", len(seeds), "--out", "all", "--json")
    return {image["seed"]: image["copy_similarity"] for image in json.loads(out)["images"]}


def each_takes(milliseconds, monkeypatch):
    pictures = TextToImage.pictures

    def timed(*args, **more):
        names = ("retrieve", "encode_neighbors", "sample")
        for each in pictures(*args, **more):
            yield replace(each, timings_ms=dict.fromkeys(names, milliseconds))

    monkeypatch.setattr(TextToImage, "pictures", timed)


def test_a_copy_is_drawn_again_from_the_seeds_that_follow(radt, monkeypatch):
    found = similarity_by_seed(radt, *range(4))
    start = next(seed for seed in range(3) if found[seed + 1] < found[seed])
    limit = (found[start] + found[start + 1]) / 2
    each_takes(1.5, monkeypatch)
    code, out, err = radt("generate", PROMPT, "--seed", start, "--max-copy", limit, "--json")
    document = json.loads(out)
    assert (code, err, document["refused"]) == (0, "", [])
    (image,) = document["images"]
    assert image["seed"] == start + 1
    assert image["copy_similarity"] == found[start + 1]
    assert set(document["timings_ms"].values()) == {2 * 1.5}  # what was thrown away took its time, too
    assert read_png(Path(image["path"]))[1].seed == start + 1
    assert [path.name for path in Path("out").iterdir()] == [Path(image["path"]).name]


def test_a_picture_that_stays_a_copy_is_not_kept_and_that_is_said(radt):
    code, out, err = radt("generate", PROMPT, "two", "--max-copy", "0", "--json")
    assert code == 1
    document = json.loads(out)
    assert document["images"] == []
    assert [each["prompt"] for each in document["refused"]] == [PROMPT, "two"]
    assert document["refused"][0]["seeds"] == list(range(1 + REDRAWS))
    assert document["refused"][0]["copy_similarity"] > 0
    lines = err.strip().splitlines()
    assert len(lines) == 2
    assert all("no picture of" in line and "--max-copy 0" in line for line in lines)
    assert not Path("out").exists()


def test_pictures_of_several_never_share_a_seed_when_they_are_drawn_again(radt):
    _, out, _ = radt("generate", PROMPT, "-n", 2, "--max-copy", "0", "--json")
    seeds = [seed for each in json.loads(out)["refused"] for seed in each["seeds"]]
    assert sorted(seeds) == list(range(2 * (1 + REDRAWS)))


def test_no_neighbour_no_copy_and_a_limit_is_a_fraction(radt):
    code, _, err = radt("generate", PROMPT, "-k", 0, "--max-copy", "0")
    assert (code, err) == (0, "")
    code, _, err = radt("generate", PROMPT, "--max-copy", "95")
    assert code == 1
    assert err.strip() == "error: max_copy is a similarity between 0 and 1 (1 refuses nothing), got 95.0"


def test_a_near_copy_is_warned_of(radt, monkeypatch):
    monkeypatch.setattr("radt.copying.WARN_ABOVE", 0.0)
    code, out, err = radt("generate", PROMPT)
    assert code == 0
    assert err.startswith(f"{out.strip()} is nearly a copy of neighbour ")
    assert "--max-copy" in err


def test_a_file_of_prompts_goes_on_where_pictures_were_drawn_again(radt):
    found = similarity_by_seed(radt, *range(1 + REDRAWS))
    limit = min(found.values())
    Path("prompts.txt").write_text(f"{PROMPT}\n")
    words = ("generate", "--prompts", "prompts.txt", "--max-copy", limit, "--out", "out", "--json")
    (image,) = json.loads(radt(*words)[1])["images"]
    before = Path(image["path"]).stat().st_mtime_ns
    assert found[image["seed"]] == limit
    (again,) = json.loads(radt(*words)[1])["images"]
    assert (again["path"], Path(again["path"]).stat().st_mtime_ns) == (image["path"], before)
    code, _, err = radt(*words[:-4], limit / 2, *words[-3:])
    assert code == 1
    assert "is above --max-copy" in err
