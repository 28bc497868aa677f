import json
import os
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from index.knowledge_base import KnowledgeBase
from radt.cli import app
from radt.neighbor_store import store_folder
from radt.neighbors import Reference
from radt.pipeline import TextToImage
from radt.provenance import replay
from tests.fakes import caption_of, draw

PROMPT = "a red circle"
LONG = "a red circle " + "and a blue square " * 10
SIZE = "10M"


@pytest.fixture
def kb(tiny_kb, tmp_path):
    return shutil.copytree(tiny_kb, tmp_path / "kb")


def load(bundle, kb, size=SIZE):
    return TextToImage.load(bundle, kb=kb, device="cpu", neighbor_store=size)


def pixels(pictures):
    return [np.asarray(picture.image) for picture in pictures]


def kept_pairs(kb):
    return {path.name.partition("-")[0] for path in (kb / "neighbors").glob("*.safetensors")}


def test_a_picture_from_kept_neighbours_is_the_picture_without_a_store(tiny_bundle, kb):
    asked = {"k": 3, "n": 2, "sampler": "ancestral", "seed": 3}
    fresh = load(tiny_bundle, kb)(PROMPT, **asked)
    kept = load(tiny_bundle, kb)(PROMPT, **asked)
    without = load(tiny_bundle, kb, None)(PROMPT, **asked, encode_apart=True)
    assert np.array_equal(pixels(fresh), pixels(kept))
    assert np.array_equal(pixels(fresh), pixels(without))
    uses = [fresh[-1].neighbor_store, kept[-1].neighbor_store]
    assert [(use["hits"], use["misses"]) for use in uses] == [(0, 3), (3, 0)]
    assert without[0].neighbor_store is None
    together = load(tiny_bundle, kb, None)(PROMPT, **asked)
    assert np.abs(np.array(pixels(together)).astype(int) - pixels(fresh)).max() <= 1


def test_other_requests_share_what_they_have_in_common(tiny_bundle, kb):
    pipeline = load(tiny_bundle, kb)
    first = {neighbor.id for neighbor in pipeline(PROMPT, k=4)[0].neighbors}
    second = {neighbor.id for neighbor in pipeline("a green square", k=4)[0].neighbors}
    assert pipeline.neighbor_store.use.hits == len(first & second)
    assert kept_pairs(kb) == first | second
    before = pipeline.neighbor_store.use.hits
    pipeline(PROMPT, k=2)  # of the same pairs other places, another K
    assert pipeline.neighbor_store.use.hits == before + 2


def test_a_picture_drawn_with_a_store_is_replayed_without_one(tiny_bundle, kb, tmp_path):
    (picture,) = load(tiny_bundle, kb)(PROMPT, k=3)
    assert picture.settings.encode_apart
    assert replay(picture.save(tmp_path / "drawn.png"), tiny_bundle).identical


def test_no_store_unless_asked_for(tiny_bundle, kb):
    (picture,) = TextToImage.load(tiny_bundle, kb=kb, device="cpu")(PROMPT)
    assert not picture.settings.encode_apart
    assert not (kb / "neighbors").exists()
    assert TextToImage.load(tiny_bundle, device="cpu", neighbor_store=SIZE).neighbor_store is None


def test_references_of_the_user_stay_with_the_user(tiny_bundle, kb):
    load(tiny_bundle, kb)(PROMPT, k=1, references=[Reference(image=draw(20), caption="mine")])
    assert kept_pairs(kb) == set()


def test_another_model_finds_nothing_of_the_first_ones(tiny_bundle, kb, tmp_path, tiny_clip):
    from tests.integration.conftest import save_tiny_bundle

    other = save_tiny_bundle(tmp_path / "other", tiny_clip, seed=1)
    load(tiny_bundle, kb)(PROMPT)
    pictures = load(other, kb)(PROMPT)
    assert pictures[0].neighbor_store["hits"] == 0
    assert np.array_equal(pixels(pictures), pixels(load(other, kb, None)(PROMPT, encode_apart=True)))


def test_what_is_removed_from_the_memory_is_not_kept_either(tiny_bundle, kb):
    pairs = [neighbor.id for neighbor in load(tiny_bundle, kb)(PROMPT, k=3)[0].neighbors]
    assert kept_pairs(kb) == set(pairs)
    KnowledgeBase.open(kb, models=[str(tiny_bundle)]).remove([int(pairs[0])])
    load(tiny_bundle, kb)("green square", k=1)
    assert pairs[0] not in kept_pairs(kb)
    assert set(pairs[1:]) <= kept_pairs(kb)


def test_damage_between_requests_changes_no_picture(tiny_bundle, kb):
    fresh = load(tiny_bundle, kb)(PROMPT, k=3)
    for place, path in enumerate(sorted((kb / "neighbors").glob("*.safetensors"))):
        content = bytearray(path.read_bytes())
        content[-5] ^= 255
        path.write_bytes([content, content[:100], b""][place])
    pipeline = load(tiny_bundle, kb)
    assert np.array_equal(pixels(fresh), pixels(pipeline(PROMPT, k=3)))
    assert pipeline.neighbor_store.use.damaged == 3
    assert np.array_equal(pixels(fresh), pixels(pipeline(PROMPT, k=3)))
    assert pipeline.neighbor_store.use.hits == 3


def test_where_it_is_kept(tiny_bundle, tiny_kb, kb, tmp_path, monkeypatch):
    monkeypatch.setenv("RADT_CACHE", str(tmp_path / "cache"))
    models = [str(tiny_bundle)]
    opened = KnowledgeBase.open(kb, models=models)
    assert store_folder(opened) == kb / "neighbors"
    several = load(tiny_bundle, [kb, tiny_kb])
    assert several.neighbor_store.folder.parent == tmp_path / "cache" / "neighbors"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert store_folder(opened).parent == tmp_path / "cache" / "neighbors"
    assert store_folder(opened) != several.neighbor_store.folder
    monkeypatch.chdir(kb.parent)
    assert store_folder(KnowledgeBase.open("kb", models=models)) == store_folder(opened)
    shutil.copytree(kb, tmp_path / "elsewhere" / "kb")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store_folder(KnowledgeBase.open("kb", models=models)) != store_folder(opened)


def test_the_commands_show_what_it_holds_and_serves(tiny_bundle, kb, tmp_path):
    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    generate = ("generate", PROMPT, "--model", tiny_bundle, "--kb", kb, "--out", tmp_path, "--neighbor-store", SIZE)
    json.loads(run(*generate, "--json"))
    document = json.loads(run(*generate, "--json"))
    use = document["neighbor_store"]
    assert (use["hits"], use["misses"], use["hit_rate"]) == (2, 0, 1.0)
    assert use["folder"] == str(kb / "neighbors")
    shown = json.loads(run("neighbor-store", "--kb", kb, "--json"))
    assert (shown["entries"], shown["hits"], shown["misses"], shown["hit_rate"]) == (2, 2, 2, 0.5)
    assert "2 encoded neighbours" in run("neighbor-store", "--kb", kb)
    assert json.loads(run("neighbor-store", "--kb", kb, "--clear", "--json"))["cleared"] == 2
    assert kept_pairs(kb) == set()


def test_a_long_prompt_and_a_long_caption_are_told(tiny_bundle, kb, tmp_path):
    command = ["generate", LONG, "--model", str(tiny_bundle), "--kb", str(kb), "--out", str(tmp_path), "-k", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert result.stderr.count("were read of") == 1
    assert 'left out was "' in result.stderr
    result = CliRunner().invoke(app, [*command, "--reference", f"{_saved(tmp_path)}={'purple star ' * 20}", "--json"])
    (image,) = json.loads(result.stdout)["images"]
    prompt, caption = image["truncated"]
    assert prompt["text"] == LONG
    assert prompt["num_read"] == 14  # a context of 16
    assert prompt["left_out"]
    assert LONG.strip().endswith(prompt["left_out"])
    assert caption["left_out"].endswith("purple star")
    pipeline = TextToImage.load(tiny_bundle, kb=kb, device="cpu")
    assert pipeline(caption_of(1))[0].truncations == ()
    (negative,) = pipeline(caption_of(1), negative_prompt=LONG)[0].truncations
    assert negative.text == LONG


def _saved(folder):
    draw(30).save(folder / "star.png")
    return folder / "star.png"
