"""From no prompt, from a picture, after drawing, the best of several, and many prompts from a file."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from index.cli import run
from index.errors import ConfigError, QueryError
from index.knowledge_base import KnowledgeBase
from radt import provenance
from radt.cli import app
from radt.generate import OF_A_RUN, RESULTS, Request, all_prompts, draw, generate_files
from radt.neighbors import Reference
from radt.pipeline import TextToImage
from radt.postprocess import apply_post
from radt.prompts_file import Prompt, read_prompts
from radt.provenance import CHUNK, read_png, replay
from tests.fakes import draw as draw_shape
from tests.fakes import encode

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle"
MEASURES = {"prompt_agreement", "sharpness", "contrast", "colorfulness", "clipped"}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle, tiny_kb):
    return TextToImage.load(tiny_bundle, kb=tiny_kb, device="cpu")


@pytest.fixture
def radt(capsys, monkeypatch, tmp_path, tiny_bundle, tiny_kb):
    """Run `radt generate` or `radt replay` with the tiny model in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command, *words):
        kb = ("--kb", str(tiny_kb)) if command == "generate" and "--unconditional" not in words else ()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(app, [command, *map(str, words), *kb, "--model", str(tiny_bundle)])
        return end.value.code or 0, *capsys.readouterr()

    return call


def images(radt, *words):
    code, out, err = radt("generate", *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["images"]


def pixels(picture):
    return np.asarray(getattr(picture, "image", picture)).astype(int)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# From no prompt


def test_an_empty_prompt_sees_neither_text_nor_knowledge_base(pipeline):
    (picture,) = pipeline("", seed=4)
    assert (picture.neighbors, picture.settings.unconditional, picture.settings.text_guidance) == ((), True, 1.0)
    settings = pipeline.settings()
    text = pipeline.bundle.text_encoder.encode(["whatever this says"])
    null = text.drop(torch.tensor([True]))
    conditions = pipeline.cascade.condition(null, None, settings)
    drawn = pipeline.cascade.sample(conditions, replace(settings, text_guidance=1.0), [4])
    assert np.array_equal(pixels(picture), ((drawn[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).int().numpy())
    assert not np.array_equal(pixels(picture), pixels(pipeline(".", k=0, seed=4)[0]))


def test_what_an_empty_prompt_makes_idle_is_refused(pipeline):
    with pytest.raises(ConfigError, match="negative_prompt"):
        pipeline("", negative_prompt="red")


def test_the_option_is_the_empty_prompt_and_replays(radt, tmp_path):
    (one,), (two,) = images(radt, "--unconditional", "--out", "a"), images(radt, "", "--out", "b")
    assert Image.open(one["path"]).tobytes() == Image.open(two["path"]).tobytes()
    assert one["quality"]["prompt_agreement"] is None
    assert radt("replay", one["path"])[0] == 0


def test_a_reference_without_a_prompt_is_drawn_from_alone(pipeline):
    (picture,) = pipeline(" ", references=[Reference(image=draw_shape(3), caption="mine")])
    assert [neighbor.id for neighbor in picture.neighbors] == ["reference:reference"]


def test_a_picture_of_an_empty_prompt_from_before_replays_as_it_was_drawn(pipeline, tiny_bundle, tmp_path):
    """It was the text "" then, with the encoder's own marks, and not the null text."""
    settings = pipeline.settings(k=0)
    (drawn,) = pipeline.draw("", [], settings=settings, seeds=[0])
    (new,) = pipeline("")
    assert not np.array_equal(drawn.numpy(), pixels(new))
    record = replace(new.record, settings=settings)
    replace(new, image=Image.fromarray(drawn.numpy()), record=record).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        values = json.loads(image.info[CHUNK])
        for name in ("unconditional", "strength", "post"):
            del values["settings"][name]
        del values["init"], values["candidates"]
        info = PngInfo()
        info.add_itxt(CHUNK, json.dumps(values), zip=True)
        image.save(tmp_path / "old.png", pnginfo=info)
    assert replay(tmp_path / "old.png", tiny_bundle).identical


# From a picture to a picture


def test_a_picture_that_starts_from_a_picture_carries_it_and_replays(radt, tmp_path):
    (tmp_path / "shape.png").write_bytes(encode(draw_shape(3)))
    words = (PROMPT, "--init-image", "shape.png", "--strength", 0.4)
    (image,) = images(radt, *words)
    assert image["init_image"] == "shape.png"
    assert image["settings"]["strength"] == 0.4
    (tmp_path / "shape.png").unlink()
    assert radt("replay", image["path"])[0] == 0
    _, record = read_png(Path(image["path"]))
    assert record.init.pixels.shape == (8, 8, 3)


def test_the_less_strength_the_nearer_to_the_picture(pipeline):
    start = draw_shape(3)
    target = pixels(pipeline.init_image(start, settings=pipeline.settings()))
    far = [np.abs(pixels(pipeline(PROMPT, init=start, strength=s)[0]) - target).mean() for s in (0.001, 0.4, 1.0)]
    assert far == sorted(far)
    assert far[0] < 1
    assert np.abs(pixels(pipeline(PROMPT, init=start, strength=1.0)[0]) - pixels(pipeline(PROMPT)[0])).max() <= 1


def test_a_large_picture_to_start_from_travels_beside_the_png(pipeline, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "INLINE_LIMIT", 100)
    picture = pipeline(PROMPT, init=draw_shape(3), strength=0.5)[0]
    path = picture.save(tmp_path / "x.png")
    assert (tmp_path / "x.png.neighbors.safetensors").exists()
    assert torch.equal(read_png(path)[1].init.pixels, picture.record.init.pixels)
    assert len(read_png(path)[1].neighbors) == 2
    assert replay(path, tiny_bundle).identical


# After drawing


def test_post_processing_is_pillows_on_the_drawn_picture_and_replays(radt, pipeline, tmp_path):
    post = "sharpen=0.5,contrast=1.3"
    (image,) = images(radt, PROMPT, "--post", post)
    with Image.open(image["path"]) as worked_on:
        plain = pipeline(PROMPT)[0].image
        assert np.array_equal(pixels(worked_on), pixels(apply_post(plain, post)))
        assert not np.array_equal(pixels(worked_on), pixels(plain))
    assert image["settings"]["post"] == post
    assert radt("replay", image["path"])[0] == 0


def test_every_picture_of_a_document_is_measured(radt):
    (image,) = images(radt, PROMPT)
    assert set(image["quality"]) == MEASURES
    assert -1 <= image["quality"]["prompt_agreement"] <= 1
    code, out, _ = radt("generate", PROMPT)
    assert (code, out) == (0, "out/00000_a-red-circle_seed0.png\n")


# The best of several


def test_the_best_of_several_agrees_best_and_is_its_own_seeds_picture(radt, pipeline):
    first, second = images(radt, PROMPT, "--best-of", 3, "-n", 2, "--seed", 10)
    for image, seeds in ((first, [10, 11, 12]), (second, [13, 14, 15])):
        assert [candidate["seed"] for candidate in image["candidates"]] == seeds
        agreements = {candidate["seed"]: candidate["prompt_agreement"] for candidate in image["candidates"]}
        assert (
            agreements[image["seed"]]
            == max(agreements.values())
            == pytest.approx(image["quality"]["prompt_agreement"], abs=1e-3)
        )
        for seed, agreement in agreements.items():
            (alone,) = pipeline(PROMPT, seed=seed)
            assert pipeline.prompt_agreements(PROMPT, [alone.image])[0] == pytest.approx(agreement, abs=1e-5)
            if seed == image["seed"]:
                assert np.array_equal(pixels(alone), pixels(Image.open(image["path"])))
        assert radt("replay", image["path"])[0] == 0
        _, record = read_png(Path(image["path"]))
        assert [candidate.seed for candidate in record.candidates] == seeds


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x", "--strength", "0.5"], "strength would have no effect without a picture to start from"),
        (["x", "--init-image", "no.png"], "no image file at 'no.png'"),
        (["x", "--init-image", "text.txt"], "cannot be read as an image"),
        (["x", "--unconditional"], "'x' was given: leave one of them out"),
        (["x", "--post", "blur=1"], "sharpen, contrast, brightness, saturation"),
        (["x", "--best-of", "0"], "best-of is the number of candidates"),
        (["", "--best-of", "2"], "a prompt is empty"),
        (["--prompts", "no.txt"], "cannot read the prompts in 'no.txt'"),
        (["--prompts", "empty.txt"], "there is no prompt in 'empty.txt'"),
        (["--prompts", "a.jsonl"], "line 2 of 'a.jsonl' is not JSON"),
        (["--prompts", "b.jsonl"], "line 1 of 'b.jsonl' should be an object with a text \"prompt\""),
        (["--prompts", "c.jsonl"], "line 1 of 'c.jsonl': seed is a whole number, got '3'"),
        (["--prompts", "d.jsonl"], "line 3 of 'd.jsonl': GenerateSettings has no field 'stepz'"),
        (["--prompts", "e.jsonl"], "line 1 of 'e.jsonl': n is the number of pictures"),
    ],
)
def test_a_mistake_is_one_sentence(radt, tmp_path, words, said):
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    (tmp_path / "c.jsonl").write_text('{"prompt": "x", "seed": "3"}')
    (tmp_path / "d.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": "x", "stepz": 3}')
    (tmp_path / "e.jsonl").write_text('{"prompt": "x", "n": 0}')
    code, out, err = radt("generate", *words)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


# Many prompts


def write_prompts(folder):
    """Seven pictures of five prompts: two of the first, one with a seed and fewer steps, one of no prompt."""
    lines = [
        {"prompt": PROMPT, "n": 2},
        {"prompt": "a blue square"},
        {"prompt": "a green triangle", "n": 2},
        {"prompt": "two", "seed": 40, "steps": 2, "k": 1},
        {"prompt": ""},
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def request_of(path, **changes):
    return Request(prompts=read_prompts(path), resume=True, measured=True, **changes)


def test_prompts_of_a_file_are_drawn_as_each_alone(radt, pipeline, tmp_path):
    drawn = images(radt, "--prompts", write_prompts(tmp_path), "--seed", 3)
    assert [(image["prompt"], image["seed"]) for image in drawn] == [
        (PROMPT, 3), (PROMPT, 4), ("a blue square", 3), ("a green triangle", 3), ("a green triangle", 4), ("two", 40),
        ("", 3),
    ]  # fmt: skip
    for image in drawn:
        own = {"steps": 2, "k": 1} if image["prompt"] == "two" else {}
        (alone,) = pipeline(image["prompt"], seed=image["seed"], **own)
        assert np.array_equal(pixels(Image.open(image["path"])), pixels(alone))
    lines = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert lines == [{name: image[name] for name in image if name not in OF_A_RUN} for image in drawn]


def test_lines_of_text_are_prompts_after_those_typed(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa wolf\r\n\r\n  # two wolves \n".encode())
    typed = all_prompts(["first"], tmp_path / "p.txt")
    assert [getattr(each, "text", each) for each in typed] == ["first", "a wolf", "# two wolves"]
    assert typed[1] == Prompt(text="a wolf", source=f"line 1 of {str(tmp_path / 'p.txt')!r}")


def test_different_prompts_share_a_network_call(pipeline, tmp_path, monkeypatch):
    rows, original = [], pipeline.cascade.sample

    def sample(conditions, settings, seeds, *args, **more):
        rows.append(len(seeds))
        return original(conditions, settings, seeds, *args, **more)

    monkeypatch.setattr(pipeline.cascade, "sample", sample)
    request = request_of(write_prompts(tmp_path), settings={"batch_size": 4})
    together = list(draw(pipeline, request, tmp_path / "together"))
    assert rows == [4, 1, 1, 1]  # five of the same settings, one with fewer steps, one of no prompt
    alone = list(draw(pipeline, replace(request, settings={}), tmp_path / "alone"))
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one.picture) - pixels(other.picture)).max() <= 1
        paid = [[neighbor.attention for neighbor in each.picture.neighbors] for each in (one, other)]
        assert paid[0] == pytest.approx(paid[1], abs=0.01)


@pytest.mark.parametrize(("batch_size", "stop_at"), [(1, 4), (1, 17), (3, 11)])
def test_a_run_that_was_stopped_goes_on_and_leaves_the_same_files(pipeline, tmp_path, batch_size, stop_at):
    def interrupt(done, total):
        if done >= stop_at:
            raise KeyboardInterrupt

    request = request_of(write_prompts(tmp_path), settings={"batch_size": batch_size})
    list(draw(pipeline, request, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        list(draw(pipeline, request, tmp_path / "stopped", on_step=interrupt))
    there = len(list((tmp_path / "stopped").glob("*.png")))
    told = []
    list(draw(pipeline, request, tmp_path / "stopped", on_step=lambda done, total: told.append((done, total))))
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert told[-1][0] == told[-1][1] <= 20 - 3 * (there - there % batch_size)
    list(draw(pipeline, request, tmp_path / "stopped", on_step=lambda *_: pytest.fail("all of it is there")))


def test_what_was_removed_is_drawn_again_and_the_results_say_all(pipeline, tiny_bundle, tiny_kb, tmp_path):
    request = request_of(write_prompts(tmp_path), best_of=2, settings={"batch_size": 2})
    request = replace(request, prompts=request.prompts[:-1])
    places = {"out": tmp_path / "out", "model": tiny_bundle, "kb": tiny_kb}
    generate_files(request, **places)
    before = contents(tmp_path / "out")
    for path in sorted((tmp_path / "out").glob("*.png"))[1:4]:
        path.unlink()
    drawn = generate_files(request, **places)
    assert contents(tmp_path / "out") == before
    assert [each.path.name for each in drawn] == sorted(name for name in before if name.endswith(".png"))
    assert drawn[0].picture.neighbors[0].original is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"steps": 2}}, "another steps"),
        ({"best_of": 2}, "another candidates"),
        ({"references": (Reference(image=draw_shape(1), caption="x", name="x.png"),)}, "another references"),
    ],
)
def test_a_folder_of_another_request_is_refused(pipeline, tmp_path, changes, said):
    request = Request(prompts=(PROMPT,), resume=True)
    list(draw(pipeline, request, tmp_path / "out"))
    with pytest.raises(QueryError, match=said):
        list(draw(pipeline, replace(request, **changes), tmp_path / "out"))


def test_other_references_of_the_same_name_and_another_memory_are_refused(pipeline, tiny_bundle, tmp_path):
    one, other = (Reference(image=draw_shape(number), caption="x", name="x.png") for number in (1, 2))
    request = Request(prompts=(PROMPT,), resume=True, references=(one,))
    list(draw(pipeline, request, tmp_path / "out"))
    assert len(list(draw(pipeline, request, tmp_path / "out"))) == 1
    for changed in (other, replace(one, caption="y")):
        with pytest.raises(QueryError, match="another references"):
            list(draw(pipeline, replace(request, references=(changed,)), tmp_path / "out"))
    with pytest.raises(QueryError, match="another knowledge base"):
        list(draw(TextToImage.load(tiny_bundle, device="cpu"), request, tmp_path / "out"))


def test_pictures_of_a_memory_that_changed_since_are_refused(tiny_bundle, tiny_kb, tmp_path):
    shutil.copytree(tiny_kb, tmp_path / "kb")
    with_it, alone = (Request(prompts=(PROMPT,), resume=True, settings={"k": k}) for k in (2, 0))

    def draw_all(request, out):
        return list(draw(TextToImage.load(tiny_bundle, kb=tmp_path / "kb", device="cpu"), request, tmp_path / out))

    draw_all(with_it, "with"), draw_all(alone, "alone")
    KnowledgeBase.open(tmp_path / "kb").add([draw_shape(9)], "Zorbo: my robot")
    with pytest.raises(QueryError, match="another state of the knowledge base"):
        draw_all(with_it, "with")
    assert len(draw_all(alone, "alone")) == 1  # nothing was looked up
    own = replace(with_it, references=tuple(Reference(image=draw_shape(i), caption="x", name=f"{i}") for i in (1, 2)))
    draw_all(own, "own")
    KnowledgeBase.open(tmp_path / "kb").add([draw_shape(8)], "Zorba: my robot")
    assert len(draw_all(own, "own")) == 1


def test_a_run_that_is_refused_leaves_the_results_of_the_one_before(radt, tmp_path):
    prompts = write_prompts(tmp_path)
    assert radt("generate", "--prompts", str(prompts), "--out", "many")[0] == 0
    before = contents(tmp_path / "many")
    status, _, said = radt("generate", "--prompts", str(prompts), "--out", "many", "--steps", "2")
    assert (status, "another steps" in said) == (1, True)
    assert contents(tmp_path / "many") == before


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from radt.generate import Request, generate_files
from radt.prompts_file import read_prompts

def kill(done, total):
    if done == 14:
        os.kill(os.getpid(), signal.SIGKILL)

request = Request(prompts=read_prompts(Path(sys.argv[2])), resume=True, measured=True)
generate_files(request, out=Path("out"), model=sys.argv[3], kb=sys.argv[4], on_step=kill)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_leaves_the_same_files(radt, tiny_bundle, tiny_kb, tmp_path):
    path = write_prompts(tmp_path)
    words = [sys.executable, "-c", KILLED, str(ROOT), str(path), str(tiny_bundle), str(tiny_kb)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "MKL_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **threads})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = contents(tmp_path / "out")
    assert len(left) == 5  # four pictures of three steps, and the results
    assert len(left[RESULTS].splitlines()) == 4
    images(radt, "--prompts", path)
    assert {name: left[name] for name in left if name != RESULTS}.items() <= contents(tmp_path / "out").items()
    os.rename(tmp_path / "out", tmp_path / "resumed")
    images(radt, "--prompts", path)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "out")
