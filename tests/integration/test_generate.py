import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from index.errors import ConfigError, KnowledgeBaseError, ModelError, QueryError, UserError
from index.knowledge_base import KnowledgeBase
from radt.bundle import changed_files, default_bundle, load_bundle, read_info
from radt.generate import Request
from radt.generate import draw as draw_files
from radt.neighbors import Reference
from radt.pipeline import TextToImage, file_name
from radt.presets import emoji_demo
from radt.provenance import CHUNK, read_png, replay
from tests.fakes import caption_of, draw
from tests.integration.conftest import NUM_PAIRS, copy_bundle, save_tiny_bundle

PROMPT = "a red circle"
TWO_THINGS = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipeline(tiny_bundle, tiny_kb):
    return TextToImage.load(tiny_bundle, kb=tiny_kb, device="cpu")


def pixels(picture):
    return np.asarray(picture.image)


def test_image_i_of_eight_is_image_i_alone_to_the_last_bit(pipeline):
    together = pipeline(PROMPT, n=8, seed=5, sampler="ancestral", order="coin")
    assert [picture.seed for picture in together] == list(range(5, 13))
    for picture in together:
        (alone,) = pipeline(PROMPT, seed=picture.seed, sampler="ancestral", order="coin")
        assert np.array_equal(pixels(alone), pixels(picture))
    assert len({picture.image.tobytes() for picture in together}) == 8


def test_batches_change_a_picture_by_one_level_at_most(pipeline):
    alone, batched = pipeline(PROMPT, n=5), pipeline(PROMPT, n=5, batch_size=3)
    for a, b in zip(alone, batched, strict=True):
        assert np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1


def test_neighbours_are_encoded_once_however_many_steps_and_pictures(pipeline, monkeypatch):
    unet, calls = pipeline.bundle.unets[0], []
    original = unet.project_neighbors
    monkeypatch.setattr(unet, "project_neighbors", lambda batch: calls.append(batch) or original(batch))
    pipeline(PROMPT, n=3, steps=4, k=2)
    assert len(calls) == 1


def test_neighbours_matter_and_none_of_them_is_drawing_from_text_alone(pipeline, tiny_bundle):
    from_text = TextToImage.load(tiny_bundle, device="cpu")(PROMPT)[0]
    assert np.array_equal(pixels(pipeline(PROMPT, k=0)[0]), pixels(from_text))
    assert not np.array_equal(pixels(pipeline(PROMPT, k=2)[0]), pixels(from_text))
    assert from_text.neighbors == ()
    assert from_text.record.copy_similarity is None


def test_a_picture_names_its_neighbours_with_scores_and_licence(pipeline):
    (picture,) = pipeline("red circle number 0", k=3, by="bm25")
    assert len(picture.neighbors) == 3
    assert picture.neighbors[0].caption == caption_of(0)
    scores = [neighbor.score for neighbor in picture.neighbors]
    assert scores == sorted(scores, reverse=True)
    assert {neighbor.license for neighbor in picture.neighbors} == {"CC0"}
    assert set(picture.timings_ms) == {"retrieve", "encode_neighbors", "sample"}


def test_an_excluded_pair_is_not_used(pipeline):
    first = pipeline(PROMPT, k=1)[0].neighbors[0].id
    assert first not in [neighbor.id for neighbor in pipeline(PROMPT, k=5, exclude=[first])[0].neighbors]


def test_several_knowledge_bases_draw_as_one(pipeline, tiny_bundle, tiny_kb, tmp_path):
    whole = KnowledgeBase.open(tiny_kb, models=[str(tiny_bundle)])
    halves = []
    for half in range(2):
        shutil.copytree(tiny_kb, tmp_path / str(half))
        base = KnowledgeBase.open(tmp_path / str(half), models=[str(tiny_bundle)])
        base.remove(sorted(whole.store.matching_ids().tolist())[half::2])
        base.build_search("exact")
        halves.append(tmp_path / str(half))
    joined = TextToImage.load(tiny_bundle, kb=halves, device="cpu")
    ours, theirs = joined(PROMPT, k=3)[0], pipeline(PROMPT, k=3)[0]
    assert [each.id for each in ours.neighbors] == [each.id for each in theirs.neighbors]
    assert np.array_equal(pixels(ours), pixels(theirs))


def test_k_may_pass_what_there_is(pipeline):
    assert len(pipeline(PROMPT, k=50)[0].neighbors) == NUM_PAIRS


def test_decomposition_and_diversity_reach_the_retriever(pipeline):
    asked = pipeline.settings(k=4, by="bm25", decompose="phrases", diversity=0.3)
    found = pipeline.retrieve(TWO_THINGS, settings=asked)
    expected = pipeline.kb.search(TWO_THINGS, k=4, by="bm25", decompose="phrases", diversity=0.3)
    assert [neighbor.id for neighbor in found] == [str(hit.id) for hit in expected]
    assert {hit.part for hit in expected} == {"a red circle", "a blue square"}
    with pytest.raises(ConfigError, match="diversity must lie between 0 and 1, got 2"):
        pipeline.settings(diversity=2.0)


def test_references_come_first_and_the_knowledge_base_fills_up(pipeline):
    given = [Reference(image=draw(20), caption="mine", name="mine.png")]
    ids = [neighbor.id for neighbor in pipeline(PROMPT, k=3, references=given)[0].neighbors]
    assert ids[0] == "reference:mine.png"
    assert len(ids) == 3
    assert [n.id for n in pipeline(PROMPT, k=1, references=given * 2)[0].neighbors] == ["reference:mine.png"] * 2


def test_what_is_removed_from_the_memory_is_not_drawn_from_any_more(tiny_bundle, tiny_kb, tmp_path):
    shutil.copytree(tiny_kb, tmp_path / "kb")
    kb = KnowledgeBase.open(tmp_path / "kb", models=[str(tiny_bundle)])
    pipeline = TextToImage.load(tiny_bundle, kb=kb, device="cpu")
    gone = pipeline(PROMPT, k=1)[0].neighbors[0].id
    kb.remove([int(gone)])
    assert pipeline(PROMPT, k=1)[0].neighbors[0].id != gone


def test_settings_come_from_the_bundle_unless_named(pipeline):
    assert pipeline(PROMPT)[0].settings.steps == 3
    assert pipeline(PROMPT, steps=2)[0].settings.steps == 2


def test_progress_is_told_step_by_step(pipeline):
    told = []
    pipeline(PROMPT, n=2, steps=3, on_step=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"sampler": "magic"}, ConfigError, "sampler 'magic'.*dpmpp_2m"),
        ({"k": -1}, ConfigError, "k is the number of neighbours"),
        ({"steps": 0}, ConfigError, "steps must be at least 1"),
        ({"text_guidance": 0.5}, ConfigError, "text_guidance must be 1"),
        ({"neighbor_guidance": float("nan")}, ConfigError, "neighbor_guidance"),
        ({"text_share": 1.5}, ConfigError, "text_share"),
        ({"samplr": "ddim"}, ConfigError, "did you mean 'sampler'"),
        ({"n": 0}, QueryError, "n is the number"),
        ({"seed": -1}, QueryError, "seed must lie"),
        ({"exclude": ["wolf"]}, QueryError, "whole number.*'wolf'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(pipeline, asked, error, said):
    with pytest.raises(error, match=said):
        pipeline(PROMPT, **asked)


def test_a_bundle_may_look_up_every_thing_that_a_prompt_names(phrases_bundle, tiny_kb):
    pipeline = TextToImage.load(phrases_bundle, kb=tiny_kb, device="cpu")
    (own,), (off,) = pipeline(TWO_THINGS), pipeline(TWO_THINGS, decompose="off")
    assert (own.settings.decompose, off.settings.decompose) == ("phrases", "off")
    assert [neighbor.part for neighbor in own.neighbors] == ["a red circle", "a blue square"]
    assert [neighbor.part for neighbor in off.neighbors] == [None, None]
    for picture, decompose in ((own, "phrases"), (off, "off")):
        hits = pipeline.kb.search(TWO_THINGS, k=2, by="bm25", decompose=decompose)
        assert [neighbor.id for neighbor in picture.neighbors] == [str(hit.id) for hit in hits]


def test_the_demonstration_model_has_the_settings_of_its_preset():
    info = read_info(default_bundle())
    assert info.sampling == emoji_demo().sampling
    assert info.sampling.decompose == "phrases"


def test_a_bundle_of_before_decomposition_searches_as_it_did(tiny_bundle, tiny_kb, tmp_path):
    old = copy_bundle(tiny_bundle, tmp_path / "old", by="bm25", decompose=None, diversity=None)
    (picture,) = TextToImage.load(old, kb=tiny_kb, device="cpu")(TWO_THINGS)
    assert (picture.settings.decompose, picture.settings.diversity) == ("off", 0.0)
    assert read_info(old).digest == read_info(tiny_bundle).digest


@pytest.mark.parametrize("asked", [{}, {"decompose": "off"}])
def test_a_picture_carries_how_its_neighbours_were_found_and_replays(phrases_bundle, tiny_kb, tmp_path, asked):
    (picture,) = TextToImage.load(phrases_bundle, kb=tiny_kb, device="cpu")(TWO_THINGS, **asked)
    path = picture.save(tmp_path / "x.png")
    _, record = read_png(path)
    assert record.settings.decompose == asked.get("decompose", "phrases")
    assert [neighbor.part for neighbor in record.neighbors] == [neighbor.part for neighbor in picture.neighbors]
    assert replay(path, phrases_bundle).identical


def test_a_picture_of_before_decomposition_replays_today(tiny_bundle, phrases_bundle, tiny_kb, tmp_path):
    (picture,) = TextToImage.load(tiny_bundle, kb=tiny_kb, device="cpu")(TWO_THINGS, by="bm25")
    path = picture.save(tmp_path / "x.png")
    with Image.open(path) as image:
        values = json.loads(image.info[CHUNK])
        for part in (values["settings"], *values["neighbors"]):
            for name in ("decompose", "diversity", "part"):
                part.pop(name, None)
        info = PngInfo()
        info.add_itxt(CHUNK, json.dumps(values), zip=True)
        image.save(tmp_path / "old.png", pnginfo=info)
    _, record = read_png(tmp_path / "old.png")
    assert record.settings.decompose == "off"
    assert {neighbor.part for neighbor in record.neighbors} == {None}
    assert replay(tmp_path / "old.png", phrases_bundle).identical


@pytest.mark.parametrize(
    "settings", [{}, {"sampler": "ancestral", "order": "coin"}, {"k": 0}, {"threshold": "dynamic"}]
)
def test_replay_needs_only_the_model(pipeline, tiny_bundle, tmp_path, settings):
    picture = pipeline(PROMPT, n=2, seed=3, **settings)[1]
    path = picture.save(tmp_path / "x.png")
    result = replay(path, tiny_bundle)
    assert result.identical
    assert result.max_difference == 0
    assert torch.get_num_threads() == picture.record.origin.threads


def test_replay_tells_a_changed_picture(pipeline, tiny_bundle, tmp_path):
    (picture,) = pipeline(PROMPT)
    changed = picture.image.copy()
    old = changed.getpixel((2, 3))
    changed.putpixel((2, 3), (old[0] ^ 128, *old[1:]))
    dataclasses.replace(picture, image=changed).save(tmp_path / "x.png")
    result = replay(tmp_path / "x.png", tiny_bundle)
    assert not result.identical
    assert result.max_difference == pytest.approx(128 / 255)


def test_replay_says_what_was_otherwise_when_it_was_drawn(pipeline, tiny_bundle, tmp_path):
    (picture,) = pipeline(PROMPT, batch_size=2)
    then = dataclasses.replace(picture.record.origin, torch="1.0", compiled=True)
    changed = dataclasses.replace(picture, record=dataclasses.replace(picture.record, origin=then))
    note = replay(changed.save(tmp_path / "x.png"), tiny_bundle).note
    expected = f"torch was 1.0 and is {torch.__version__}; its networks were compiled; it was made in batches of 2"
    assert note == expected


def test_replay_by_another_model_is_refused_with_both_names(pipeline, tiny_clip, tmp_path):
    path = pipeline(PROMPT)[0].save(tmp_path / "x.png")
    other = save_tiny_bundle(tmp_path / "other", tiny_clip, seed=1)
    with pytest.raises(ModelError, match=f"{pipeline.digest}.*{read_info(other).digest}"):
        replay(path, other)


def test_a_picture_of_another_size_is_not_replayed(pipeline, tiny_bundle, tmp_path):
    (picture,) = pipeline(PROMPT)
    dataclasses.replace(picture, image=picture.image.resize((16, 16))).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="16x16 and was drawn 8x8"):
        replay(tmp_path / "x.png", tiny_bundle)


def test_interrupting_leaves_whole_pictures_only(pipeline, tmp_path):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    request = Request(prompts=(PROMPT,), n=3)
    with pytest.raises(KeyboardInterrupt):
        list(draw_files(pipeline, request, tmp_path, on_step=interrupt))
    assert [path.name for path in tmp_path.iterdir()] == ["00000_a-red-circle_seed0.png"]
    with Image.open(tmp_path / "00000_a-red-circle_seed0.png") as image:
        image.load()


def test_a_bundle_comes_back_as_it_was_written(tiny_bundle, tmp_path, tiny_clip):
    again = save_tiny_bundle(tmp_path / "again", tiny_clip)
    assert read_info(again) == read_info(tiny_bundle)
    assert changed_files(tiny_bundle, read_info(tiny_bundle)) == []
    (unet,) = load_bundle(again).unets
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def break_shape(folder):
    path = folder / "stage0" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "channels": [16, 16]}))


def break_weights(folder):
    path = folder / "stage0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_format(folder):
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def break_field(folder):
    path = folder / "stage0" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chanels": [1]}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_shape, r"of shape \(8, .*where config.json needs \(16, "),
        (break_weights, "cannot be read.*copy the model again"),
        (break_format, "format 99"),
        (break_field, "did you mean 'channels'"),
        (lambda folder: (folder / "stage0" / "model.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "bundle.json").unlink(), "has no bundle.json"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_damaged_bundle_is_one_sentence(tiny_bundle, tmp_path, damage, said):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    damage(folder)
    with pytest.raises(ModelError, match=said):
        load_bundle(folder)


def test_changed_weights_are_found_by_their_digest(tiny_bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    path = folder / "stage0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    assert changed_files(folder, read_info(folder)) == ["stage0/model.safetensors"]


def test_a_knowledge_base_of_another_model_is_refused(tiny_bundle, other_clip, tmp_path):
    from index.embedder import ClipEmbedder

    kb = KnowledgeBase.create(tmp_path / "kb", ClipEmbedder.load(str(other_clip)))
    kb.add([draw(0)], "a shape")
    (tmp_path / "kb" / "kb.json").write_text(
        (tmp_path / "kb" / "kb.json").read_text().replace(str(other_clip), str(tiny_bundle))
    )
    with pytest.raises(KnowledgeBaseError, match="fingerprint"):
        TextToImage.load(tiny_bundle, kb=tmp_path / "kb", device="cpu")(PROMPT)


def test_an_empty_knowledge_base_is_one_sentence(tiny_bundle, tmp_path):
    from index.embedder import ClipEmbedder

    KnowledgeBase.create(tmp_path / "kb", ClipEmbedder.load(str(tiny_bundle)))
    with pytest.raises(KnowledgeBaseError, match="empty"):
        TextToImage.load(tiny_bundle, kb=tmp_path / "kb", device="cpu")(PROMPT)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A wolf, on red!", "00007_a-wolf-on-red_seed3.png"),
        ("\u72fc", "00007_picture_seed3.png"),
        ("../../etc/passwd", "00007_etc-passwd_seed3.png"),
        ("x" * 300, f"00007_{'x' * 40}_seed3.png"),
    ],
)
def test_file_names_say_what_is_drawn(prompt, name):
    assert file_name(7, prompt, 3) == name
