import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from index.errors import CorpusError
from radt.corpora.emoji import (
    Entity,
    GlyphRenderer,
    compose,
    find_font,
    load_entities,
    placement_layer,
    rendition,
    rendition_layer,
    select,
)


@pytest.fixture(scope="module")
def glyphs():
    return GlyphRenderer()


def named(name):
    return next(entity for entity in load_entities() if entity.name == name)


def test_the_table_is_what_the_design_promises():
    entities = load_entities()
    assert [entity.position for entity in entities] == list(range(len(entities)))
    assert 1800 < len(entities) < 2000
    assert len({entity.name for entity in entities}) == len({entity.codes for entity in entities}) == len(entities)
    assert not any("1F3FB" <= code <= "1F3FF" for entity in entities for code in entity.codes)
    wolf = named("wolf")
    assert (wolf.sequence, wolf.caption, wolf.group) == ("\U0001f43a", "wolf: face", "Animals & Nature")


def test_held_out_is_a_tenth_of_the_classes_and_of_every_group():
    classes, groups = defaultdict(set), defaultdict(list)
    for entity in load_entities():
        classes[entity.class_id].add(entity.held_out)
        groups[entity.group].append(entity.held_out)
    assert all(len(held_out) == 1 for held_out in classes.values()), "a class straddles the split"
    assert np.mean([held_out == {True} for held_out in classes.values()]) == pytest.approx(0.1, abs=0.003)
    assert all(0.07 < np.mean(held_out) < 0.13 for held_out in groups.values())


def test_nothing_trained_on_says_a_held_out_name():
    said = {phrase.lower() for e in select(load_entities(), "train") for phrase in (e.name, *e.keywords)}
    assert not said & {e.name.lower() for e in select(load_entities(), "heldout")}


def test_twins_share_a_class_and_strangers_do_not():
    assert (
        named("flag: France").class_id
        == named("flag: St. Martin").class_id
        == named("flag: Clipperton Island").class_id
    )
    assert named("flag: Norway").class_id == named("flag: Bouvet Island").class_id
    assert named("flag: France").class_id != named("flag: Netherlands").class_id
    assert named("wolf").class_id != named("fox").class_id


def test_a_caption_does_not_repeat_words():
    entity = replace(
        named("wolf"), name="grey wolf", keywords=("wolf", "animal", "wild animal", "animal, wild", "grey")
    )
    assert entity.caption == "grey wolf: animal, wild animal"
    assert replace(entity, keywords=("wolf",)).caption == "grey wolf"


def test_select_refuses_an_unknown_split():
    with pytest.raises(CorpusError, match="unknown split 'test': use one of all, train, heldout"):
        select(load_entities(), "test")


def test_a_missing_font_names_the_package(monkeypatch):
    monkeypatch.setattr("radt.corpora.emoji.FONT_PATHS", ())
    with pytest.raises(CorpusError, match="apt install fonts-noto-color-emoji"):
        find_font()
    with pytest.raises(CorpusError, match=r"no font file at nowhere\.ttf"):
        find_font("nowhere.ttf")


def test_a_file_that_is_no_font_is_refused(tmp_path):
    path = tmp_path / "font.ttf"
    path.write_text("not a font")
    with pytest.raises(CorpusError, match="cannot be opened as a colour-emoji font"):
        GlyphRenderer(path)


def test_a_font_without_colour_emoji_is_refused(tmp_path):
    path = tmp_path / "letters.ttf"
    path.write_bytes(ImageFont.load_default(20).font_bytes)
    with pytest.raises(CorpusError, match="draws no emoji in colour"):
        GlyphRenderer(path)


def test_the_font_draws_every_entity_and_says_when_it_cannot(glyphs):
    assert all(glyphs.draws(entity) for entity in load_entities()[::50])
    unassigned, two_glyphs = replace(named("wolf"), codes=("10FFFE",)), replace(named("wolf"), codes=("1F43A", "1F43A"))
    assert not glyphs.draws(unassigned)
    assert not glyphs.draws(two_glyphs)
    with pytest.raises(CorpusError, match="does not draw 'wolf'"):
        glyphs.glyph(unassigned)


def test_a_glyph_is_square_and_filled_by_its_ink(glyphs):
    for entity in load_entities()[::100]:
        glyph = glyphs.glyph(entity)
        left, top, right, bottom = glyph.getchannel("A").getbbox()
        assert glyph.width == glyph.height == max(right - left, bottom - top)
    assert glyphs[named("wolf").position] is glyphs.glyph(named("wolf"))


def test_a_glyph_composes_as_the_font_draws_it_on_the_same_ground(glyphs):
    """The slow twin: Pillow drawing straight onto an opaque ground. Catches alpha multiplied in twice."""
    ground = (40, 90, 200)
    font = ImageFont.truetype(str(glyphs.path), 109, layout_engine=ImageFont.Layout.RAQM)
    for name in ("grinning face", "hand with fingers splayed", "flag: Japan"):
        canvas = Image.new("RGB", (300, 300), ground)
        ImageDraw.Draw(canvas).text((80, 80), named(name).sequence, font=font, embedded_color=True)
        alpha = Image.new("L", canvas.size)
        alpha.paste(255, (0, 0), Image.fromarray((np.asarray(canvas) != ground).any(-1)))
        expected = np.asarray(canvas.crop(alpha.getbbox())).astype(int)
        glyph = glyphs.glyph(named(name))
        drawn = compose(np.array(glyph.crop(glyph.getchannel("A").getbbox()).convert("RGBa")), ground).astype(int)
        assert drawn.shape == expected.shape
        assert np.abs(drawn - expected).max() <= 3


def test_compose_by_hand():
    layer = np.array([[[0, 0, 0, 0], [100, 50, 0, 255], [100, 0, 0, 128]]], dtype=np.uint8)
    assert compose(layer, (200, 200, 200)).tolist() == [[[200, 200, 200], [100, 50, 0], [200, 100, 100]]]
    picture = np.array([[[1, 2, 3], [4, 5, 6], [0, 0, 0]]], dtype=np.uint8)
    assert compose(layer, picture).tolist() == [[[1, 2, 3], [100, 50, 0], [100, 0, 0]]]
    grounds = np.array([[200, 200, 200], [0, 0, 0]], dtype=np.uint8)
    batch = compose(np.stack([layer, layer]), grounds[:, None, None])
    assert (batch[0] == compose(layer, grounds[0])).all()
    assert (batch[1] == compose(layer, grounds[1])).all()


def test_a_layer_fills_its_box_and_nothing_else():
    """Lanczos rings for two pixels about an edge: exact further in, clear further out, half way in between."""
    solid = Image.new("RGBA", (160, 160), (255, 0, 0, 255))
    layer = placement_layer(solid, (0.25, 0.5, 0.75, 1.0), 64)
    assert (layer[36:60, 20:44] == (255, 0, 0, 255)).all()
    assert not layer[:29].any()
    assert not layer[:, :13].any()
    assert not layer[:, 51:].any()
    covered = layer[..., 3] > 127
    assert covered[32:64, 16:48].all()
    assert covered.sum() == 32 * 32


def test_a_layer_keeps_its_place_between_pixels():
    """Half a pixel of the box gives half the coverage, on both sides."""
    solid = Image.new("RGBA", (160, 160), (255, 255, 255, 255))
    alpha = placement_layer(solid, (4.5 / 16, 0.0, 11.5 / 16, 1.0), 16)[8, :, 3].astype(int)
    assert alpha.tolist() == alpha[::-1].tolist()
    assert alpha[4] == pytest.approx(127.5, abs=3)


def test_a_box_reaching_out_of_the_frame_is_cropped():
    solid = Image.new("RGBA", (40, 40), (9, 9, 9, 255))
    assert (placement_layer(solid, (-0.5, -0.5, 1.5, 1.5), 16) == (9, 9, 9, 255)).all()


@pytest.mark.parametrize("size", [16, 32, 128, 200])
def test_layers_are_premultiplied(glyphs, size):
    for entity in load_entities()[::300]:
        layer = rendition_layer(glyphs.glyph(entity), rendition(entity, 1), size)
        assert layer.shape == (size, size, 4)
        assert (layer[..., :3] <= layer[..., 3:]).all()


def test_renditions_are_fixed_and_as_specified(glyphs):
    first = rendition(named("wolf"), 0)
    assert (first.scale, first.angle, first.shift, first.ground) == (0.92, 0.0, (0.0, 0.0), (255, 255, 255))
    drawn = [rendition(entity, number) for entity in load_entities()[::20] for number in (1, 2, 3)]
    assert rendition(named("wolf"), 2) == rendition(named("wolf"), 2)
    assert rendition(named("wolf"), 2) != rendition(named("wolf"), 3)
    assert all(0.72 <= r.scale <= 0.95 and -8 <= r.angle <= 8 for r in drawn)
    assert all(-1e-9 <= edge <= 1 + 1e-9 for r in drawn for edge in r.box), "the ink would leave the frame"
    assert len({r.ground_name for r in drawn}) > 8


def test_a_turned_rendition_fills_its_box_and_loses_nothing(glyphs):
    turned = replace(rendition(named("red square"), 1), angle=8.0, scale=0.8, shift=(0.0, 0.0))
    alpha = rendition_layer(glyphs.glyph(named("red square")), turned, 200)[..., 3]
    left, top, right, bottom = Image.fromarray(alpha).point(lambda a: 255 * (a > 40)).getbbox()
    assert (left, top, right, bottom) == pytest.approx((20, 20, 180, 180), abs=2)


def test_the_committed_table_is_one_entity_a_line():
    from importlib.resources import files

    lines = files("radt.corpora").joinpath("emoji.json").read_text(encoding="ascii").splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert json.loads(lines[1].rstrip(","))["name"] == load_entities()[0].name
    assert len(lines) == len(load_entities()) + 2
    assert isinstance(load_entities()[0], Entity)
