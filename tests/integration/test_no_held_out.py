"""Nothing of the held-out set is in any training input; and a run in which it is, is told so by `radt doctor RUN`.

Looked at is everything that a generator or a CLIP learns from: names and keywords in captions, codes in records, and
pictures, of which every one comes from `GlyphRenderer.glyph`. Each check is shown to find what is put in its way.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from index.cli import run as run_command
from index.errors import CorpusError
from index.records import Hit, ImageLocation
from radt.cli import app
from radt.corpora.emoji import GlyphRenderer, load_entities, placement_layer, select, write_emoji
from radt.presets import PRESETS, clip_emoji
from radt.training.clip import VOCABULARY_SCENES
from radt.training.doctor import examine_run
from radt.training.emoji_pack import check_no_own, draw_layer
from radt.training.emoji_pairs import EmojiPairs, vocabulary_captions
from radt.training.leaks import (
    SHADE,
    HeldOutWords,
    _as_in_pack,
    _drawn_again,
    leaks_in_corpus,
    leaks_in_pictures,
    leaks_in_targets,
    leaks_in_texts,
    own_records,
)
from radt.training.pack import Pack, read_facts
from radt.training.precompute import Captions
from radt.training.run import train
from tests.integration.conftest import tiny_run

TABLE = load_entities()
HELD_OUT = {entity.position for entity in TABLE if entity.held_out}
ENTITIES, SCENES = 40, 60
Radt: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def glyphs() -> GlyphRenderer:
    return GlyphRenderer()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The positions of all entities that anything draws."""
    return spy(monkeypatch)


def spy(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    positions: set[int] = set()
    glyph = GlyphRenderer.glyph

    def noted(self, entity):
        positions.add(entity.position)
        return glyph(self, entity)

    monkeypatch.setattr(GlyphRenderer, "glyph", noted)
    return positions


@pytest.fixture
def radt(capsys: pytest.CaptureFixture[str]) -> Radt:
    """The exit code of a command, and what it printed."""

    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(app, [str(word) for word in words])
        return int(end.value.code or 0), capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def run(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, set[int]]]:
    """A small run of the whole way from corpus to bundle, and every entity that was drawn on it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("held-out") / "run"
    with pytest.MonkeyPatch.context() as patched:
        positions = spy(patched)
        asked = tiny_run(tiny_clip, entities=ENTITIES, scenes=SCENES, steps=6)
        train("tiny", [*asked, "loop.save_every=3"], out)
    yield out, positions
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_split_is_by_class_and_has_both_sides() -> None:
    classes = {held: {entity.class_id for entity in TABLE if entity.held_out == held} for held in (False, True)}
    assert not classes[True] & classes[False]
    assert len(classes[True]) > 150


def test_every_held_out_name_and_keyword_of_its_own_is_known_in_any_sentence() -> None:
    theirs = HeldOutWords(TABLE)
    own = [e for e in TABLE if e.held_out and theirs.found_in(e.name)]
    assert len(own) > 0.9 * len(HELD_OUT)  # the others' names lie within a name that is trained: "cat" in "cat face"
    for entity in own:
        assert theirs.found_in(f"a picture of {entity.name} on a red background"), entity.name
        assert theirs.found_in(entity.caption), entity.name
    assert not any(theirs.found_in(entity.caption) for entity in TABLE if not entity.held_out)


def test_what_a_training_entity_makes_with_the_words_after_it_is_not_held_out() -> None:
    theirs = HeldOutWords(TABLE)  # "pick-up" is a keyword of the pickup truck, which is; the pick is not
    assert theirs.found_in("orange ground, a pick up at the top") == []
    assert theirs.found_in("orange ground, a pickup up at the top") == ["pickup"]
    assert theirs.found_in("a pink heart up at the top") == ["pink heart"]


def test_a_training_run_draws_and_names_nothing_held_out(run: tuple[Path, set[int]], glyphs: GlyphRenderer) -> None:
    out, positions = run
    assert positions
    assert not positions & HELD_OUT
    pack = Pack.load(out / "pack.safetensors")
    captions = Captions.load(out, pack)
    assert list(leaks_in_texts([*captions.scenes, *captions.pictures], where="captions")) == []
    assert list(leaks_in_corpus(out / "corpus")) == []
    assert list(leaks_in_pictures(pack, glyphs)) == []
    config = replace(PRESETS["tiny"]().pack, num_scenes=SCENES, num_entities=ENTITIES)
    assert read_facts(out / "pack.safetensors")["config"]
    assert list(leaks_in_targets(pack, captions, config, glyphs)) == []
    assert list(own_records(pack, captions, config, glyphs)) == []


def test_the_corpus_that_a_pack_is_made_of_has_no_held_out_record(tmp_path: Path, drawn: set[int]) -> None:
    """All of it, at a size that is quick to draw."""
    write_emoji(tmp_path, split="train", renditions=1, size=8)
    assert len(drawn) > 1600
    assert not drawn & HELD_OUT
    assert list(leaks_in_corpus(tmp_path)) == []


def test_what_clip_emoji_learns_from_has_nothing_held_out(drawn: set[int]) -> None:
    config = clip_emoji()
    training = select(TABLE, "train")
    pairs = EmojiPairs(training, GlyphRenderer(), image_size=8, renditions=1, seed=config.seed)
    theirs = HeldOutWords(TABLE)
    said = [caption for step in range(40) for caption in pairs.batch(step, config.batch_size)[1]]
    assert drawn
    assert not drawn & HELD_OUT
    assert not [word for caption in said for word in theirs.found_in(caption) if word in theirs.words]
    vocabulary = vocabulary_captions(training, num_scenes=VOCABULARY_SCENES, seed=config.seed)
    assert list(leaks_in_texts(vocabulary, where="vocabulary")) == []


def test_clip_emoji_refuses_held_out_entities(glyphs: GlyphRenderer) -> None:
    with pytest.raises(AssertionError, match="held-out"):
        EmojiPairs(TABLE, glyphs, image_size=8, renditions=1, seed=0)
    with pytest.raises(AssertionError, match="held-out"):
        list(vocabulary_captions(TABLE, num_scenes=1, seed=0))


def test_a_corpus_of_all_entities_is_a_leak(tmp_path: Path) -> None:
    write_emoji(tmp_path, split="heldout", renditions=1, size=8, num_entities=5)
    found = [leak.what for leak in leaks_in_corpus(tmp_path)]
    assert sum("shows" in what for what in found) == 5
    assert any("says" in what for what in found)


def test_a_scene_with_its_own_record_among_its_neighbours_stops_the_pack() -> None:
    hits = [[hit(7), hit(8)], [hit(7)]]
    check_no_own(hits, [[9], [8]])
    with pytest.raises(CorpusError, match=r"pair 7 .* is what scene 1 was drawn from"):
        check_no_own(hits, [[9], [7]])


def hit(number: int) -> Hit:
    facts = {"caption": "a thing", "dataset": "d", "image": ImageLocation(uri="")}
    return Hit(id=number, rank=1, score=1.0, clip=None, bm25=1.0, **facts)


def states(folder: Path) -> dict[str, str]:
    return {finding.name: finding.state for finding in examine_run(folder).findings}


def test_the_doctor_finds_a_whole_run_well(run: tuple[Path, set[int]], radt: Radt, tmp_path: Path) -> None:
    out, _ = run
    assert states(out) == {
        "loss": "ok",
        "gradient": "ok",
        "reference curve": "unknown",
        "neighbours": "warning",  # six steps teach nobody to look at them
        "dropping": "ok",
        "leaks: corpus": "ok",
        "leaks: captions": "ok",
        "leaks: pictures": "ok",
        "leaks: targets": "ok",
        "leaks: own records": "ok",
    }
    lines = [json.loads(line) for line in (out / "probe.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    code, document = radt("doctor", out, "--out", tmp_path / "curves.png", "--json")
    told = json.loads(document)
    assert code == 0
    assert told["well"]
    assert told["preset"] == "tiny"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def spoiled(run: tuple[Path, set[int]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(run[0], tmp_path / "spoiled", ignore=shutil.ignore_patterns("bundle", "kb")))


def rewrite(folder: Path, **changes: torch.Tensor) -> None:
    facts = read_facts(folder / "pack.safetensors")
    pack = replace(Pack.load(folder / "pack.safetensors"), **changes)
    pack.save(folder / "pack.safetensors", {name: facts[name] for name in ("config", "clip", "text_encoder")})


def test_the_doctor_finds_a_held_out_name(spoiled: Path) -> None:
    kept = json.loads((spoiled / "captions.json").read_text())
    name = next(entity.name for entity in TABLE if entity.held_out and HeldOutWords(TABLE).found_in(entity.name))
    kept["scenes"][5] = f"a {name} on red"
    (spoiled / "captions.json").write_text(json.dumps(kept))
    found = states(spoiled)
    assert found["leaks: captions"] == "error"
    assert found["leaks: targets"] == "unknown"
    assert found["leaks: own records"] == "unknown"  # the scene is not the one that its lot draws


def test_the_doctor_finds_a_held_out_picture(spoiled: Path, glyphs: GlyphRenderer) -> None:
    pack = Pack.load(spoiled / "pack.safetensors")
    entity = next(entity for entity in TABLE if entity.held_out and glyphs.draws(entity))
    pictures = pack.pictures.clone()
    pixels = bytearray(_as_in_pack(glyphs, entity, 2, pack))
    pictures[3] = torch.frombuffer(pixels, dtype=torch.uint8).view(pictures[3].shape)
    rewrite(spoiled, pictures=pictures)
    assert states(spoiled)["leaks: pictures"] == "error"


def test_the_doctor_finds_a_held_out_glyph_among_the_targets(spoiled: Path, glyphs: GlyphRenderer, radt: Radt) -> None:
    """One scene that is drawn with a held-out glyph, in the place of its own, under the caption of a trained one."""
    pack = Pack.load(spoiled / "pack.safetensors")
    captions = Captions.load(spoiled, pack)
    config = replace(PRESETS["tiny"]().pack, num_scenes=SCENES, num_entities=ENTITIES)
    place, scene = next(each for each in _drawn_again(captions, config, glyphs) if len(each[1].placements) == 1)
    entity = next(entity for entity in TABLE if entity.held_out and glyphs.draws(entity))
    other = replace(scene, placements=(replace(scene.placements[0], entity=entity.position),))
    layers, row = pack.layers.clone(), int(pack.scene_layer[place])
    layers[row] = torch.from_numpy(draw_layer(other, glyphs, pack.size[0]))
    rewrite(spoiled, layers=layers)
    assert states(spoiled)["leaks: targets"] == "error"
    code, out = radt("doctor", spoiled)
    assert code == 1
    assert f"scene {place} " in out
    assert "shows something else" in out


def test_a_held_out_glyph_is_told_from_the_trained_one_that_is_most_like_it(glyphs: GlyphRenderer) -> None:
    """Each held-out glyph beside all trained ones, small, as scenes show them: none is within a shade of another."""
    import numpy as np

    box = (0.3, 0.3, 0.7, 0.7)
    drawn = [entity for entity in TABLE if glyphs.draws(entity)]
    layers = np.stack([placement_layer(glyphs.glyph(entity), box, 32) for entity in drawn]).astype(np.int16)
    held_out = np.array([entity.held_out for entity in drawn])
    nearest = [np.abs(layers[~held_out] - one).max(axis=(1, 2, 3)).min() for one in layers[held_out]]
    assert min(nearest) > SHADE


def test_the_doctor_finds_a_scene_among_its_own_neighbours(spoiled: Path, glyphs: GlyphRenderer, radt: Radt) -> None:
    import numpy as np

    from radt.corpora.scenes import sample_scene

    pack = Pack.load(spoiled / "pack.safetensors")
    config = PRESETS["tiny"]().pack
    trained = [entity for entity in select(TABLE, "train") if glyphs.draws(entity)][:ENTITIES]
    scene = sample_scene(np.random.default_rng([config.seed, 4]), trained, kinds=config.kinds)
    pictures, neighbors = pack.pictures.clone(), pack.scene_neighbors.clone()
    pixels = bytearray(_as_in_pack(glyphs, TABLE[scene.placements[0].entity], 0, pack))
    pictures[0] = torch.frombuffer(pixels, dtype=torch.uint8).view(pictures[0].shape)
    neighbors[4, 0] = 0
    rewrite(spoiled, pictures=pictures, scene_neighbors=neighbors)
    code, out = radt("doctor", spoiled)
    assert code == 1
    assert "scene 4" in out
    assert "has its own record among its neighbours" in out


def test_scenes_that_are_all_wrong_beside_neighbours_of_this_font_are_a_leak(
    spoiled: Path, glyphs: GlyphRenderer
) -> None:
    """Nor are scenes that are as drawn here unknown, where neighbours differ by how they were resized."""
    pack, config = Pack.load(spoiled / "pack.safetensors"), PRESETS["tiny"]().pack
    config = replace(config, num_scenes=SCENES, num_entities=ENTITIES)
    captions = Captions.load(spoiled, pack)
    assert len(leaks_in_targets(replace(pack, layers=pack.layers.flip(-2)), captions, config, glyphs)) == SCENES
    assert leaks_in_targets(replace(pack, pictures=255 - pack.pictures), captions, config, glyphs) == []


def test_of_a_pack_of_another_font_the_doctor_knows_nothing(spoiled: Path, radt: Radt) -> None:
    """No picture is found again, which is no proof that none is held out, and no scene shows what it would here."""
    pack = Pack.load(spoiled / "pack.safetensors")
    rewrite(spoiled, pictures=255 - pack.pictures, layers=pack.layers.flip(-2))
    code, out = radt("doctor", spoiled)
    assert code == 0
    for name in ("pictures", "targets", "own records"):
        assert any(line.startswith("unknown") and name in line and "another font" in line for line in out.splitlines())


def test_the_doctor_of_a_run_that_diverged(spoiled: Path, radt: Radt) -> None:
    with (spoiled / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "images_seen": 28, "loss": NaN, "grad_norm": NaN}\n')
    code, out = radt("doctor", spoiled)
    assert code == 1
    assert "diverged at step 7" in out


def test_what_is_missing_is_said_and_no_error(spoiled: Path) -> None:
    shutil.rmtree(spoiled / "corpus")
    for name in ("pack.safetensors", "probe.jsonl", "state.safetensors"):
        (spoiled / name).unlink()
    found = states(spoiled)
    assert found["loss"] == "ok"
    unknown = {"reference curve", "neighbours", "dropping", *(name for name in found if name.startswith("leaks"))}
    assert {name for name, state in found.items() if state == "unknown"} == unknown


def test_the_doctor_of_a_run_takes_no_model(spoiled: Path, radt: Radt) -> None:
    assert radt("doctor", spoiled, "--model", spoiled)[0] == 2


def test_the_doctor_takes_no_picture_of_an_installation(radt: Radt) -> None:
    assert radt("doctor", "--out", "x.png")[0] == 2
