from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from index.errors import CorpusError
from radt.corpora.emoji import load_entities, select
from radt.corpora.scenes import (
    COUNT_WORDS,
    KINDS,
    PALETTE,
    SIZE_WORDS,
    benchmark_prompt,
    render_scene,
    sample_scene,
    scene_facts,
)
from radt.corpora.wording import noun, plural, with_article


def named(name):
    return next(entity for entity in load_entities() if entity.name == name)


def scenes(kind, num=60):
    return [sample_scene(np.random.default_rng([7, i]), load_entities(), kinds={kind: 1.0}) for i in range(num)]


def lab(color):
    """CIE 1976 L*a*b* of an sRGB colour, white point D65."""
    c = np.array(color) / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = matrix @ linear / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_grounds_are_well_apart_in_lab():
    assert len(PALETTE) == 12
    assert min(np.linalg.norm(lab(a) - lab(b)) for a, b in combinations(PALETTE.values(), 2)) > 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_says_its_ground_and_its_entities_and_stays_in_the_frame(kind):
    for scene in scenes(kind):
        assert scene.kind == kind
        assert scene.ground in scene.caption.split(" ") or f"{scene.ground} " in scene.caption
        assert all(0 <= edge <= 1 for placement in scene.placements for edge in placement.box)
        for placement in scene.placements:
            thing = noun(load_entities()[placement.entity])
            assert thing in scene.caption or (plural(thing) or thing) in scene.caption


def test_the_alone_kind_says_nothing_of_place_or_size():
    for scene in scenes("alone"):
        (placement,) = scene.placements
        assert placement.box == pytest.approx((0.11, 0.11, 0.89, 0.89))
        assert (scene.size, scene.place, scene.count) == (None, None, 1)


def test_placed_scenes_lie_where_they_say():
    for scene in scenes("placed"):
        left, top, right, bottom = scene.placements[0].box
        assert (right - left, bottom - top) == pytest.approx((0.45, 0.45))
        assert ("left" in scene.place) == (right < 0.5)
        assert ("right" in scene.place) == (left > 0.5)
        assert ("top" in scene.place) == (bottom < 0.5)
        assert ("bottom" in scene.place) == (top > 0.5)
        assert all(word in scene.caption for word in scene.place.split())


def test_sized_scenes_are_as_large_as_they_say():
    for scene in scenes("sized"):
        side = scene.placements[0].box[2] - scene.placements[0].box[0]
        assert (side > 0.9) == (scene.size == "large")
        assert (side < 0.5) == (scene.size == "small")
        assert any(f"{word} " in scene.caption for word in SIZE_WORDS[scene.size])


def test_counted_scenes_show_and_say_their_count():
    for scene in scenes("counted"):
        assert scene.count == len(scene.placements) in {2, 3, 4}
        assert len({placement.entity for placement in scene.placements}) == 1
        assert COUNT_WORDS[scene.count] in scene.caption or str(scene.count) in scene.caption
        assert not overlaps(scene.placements)


def test_scenes_of_two_show_two_classes_in_the_order_they_say():
    for scene in scenes("two"):
        first, second = scene.placements
        assert load_entities()[first.entity].class_id != load_entities()[second.entity].class_id
        assert not overlaps(scene.placements)
        holds = {
            "left of": first.box[2] < second.box[0],
            "right of": first.box[0] > second.box[2],
            "above": first.box[3] < second.box[1],
            "below": first.box[1] > second.box[3],
        }
        assert [relation for relation, is_so in holds.items() if is_so] == [scene.place]
        assert scene.caption.index(noun(load_entities()[first.entity])) < scene.caption.rindex(
            noun(load_entities()[second.entity])
        )


def overlaps(placements):
    boxes = [placement.box for placement in placements]
    return any(
        max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3]) for a, b in combinations(boxes, 2)
    )


def test_the_kinds_come_at_their_weights_and_the_words_vary():
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng, [named("wolf"), named("pizza")]) for _ in range(2000)]
    for kind, weight in KINDS.items():
        share = np.mean([scene.kind == kind for scene in drawn])
        assert share == pytest.approx(weight, abs=4 * np.sqrt(weight * (1 - weight) / 2000))
    assert len({s.caption for s in drawn if s.kind == "alone" and s.ground == "red"}) > 15


def test_scenes_follow_the_generator():
    pair = [sample_scene(np.random.default_rng(3), load_entities()) for _ in range(2)]
    assert pair[0] == pair[1]
    assert pair[0] != sample_scene(np.random.default_rng(4), load_entities())


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(CorpusError, match="no entity"):
        sample_scene(np.random.default_rng(0), [])
    with pytest.raises(CorpusError, match="needs another class beside 'wolf'"):
        sample_scene(np.random.default_rng(0), [named("wolf")], kinds={"two": 1.0})
    with pytest.raises(CorpusError, match="unknown ground 'mauve'"):
        benchmark_prompt(named("wolf"), "mauve")


def test_the_benchmark_prompt():
    scene = benchmark_prompt(named("wolf"), "orange")
    assert (scene.caption, scene.kind, scene.ground) == ("a wolf on an orange background", "alone", "orange")


def test_render_scene_by_hand():
    """Two solid squares: their pixels are where the boxes say, the ground is exact elsewhere."""
    rng = np.random.default_rng(0)
    wolf, pizza = named("wolf"), named("pizza")
    scene = next(
        s for s in (sample_scene(rng, [wolf, pizza], kinds={"two": 1.0}) for _ in range(99)) if s.place == "left of"
    )
    solid = {
        scene.placements[0].entity: Image.new("RGBA", (50, 50), (1, 2, 3, 255)),
        scene.placements[1].entity: Image.new("RGBA", (50, 50), (9, 8, 7, 255)),
    }
    picture = render_scene(scene, solid, 100)
    assert (picture[40:60, 5:45] == (1, 2, 3)).all()
    assert (picture[40:60, 55:95] == (9, 8, 7)).all()
    assert (picture[:20] == PALETTE[scene.ground]).all()


def test_the_facts_of_a_scene():
    scene = benchmark_prompt(named("wolf"), "red")
    facts = scene_facts(scene, load_entities())
    assert (facts["ground"], facts["count"], facts["held_out"]) == ("red", 1, False)
    assert facts["entities"] == [
        {"codes": "1F43A", "name": "wolf", "class_id": named("wolf").class_id, "box": [0.11, 0.11, 0.89, 0.89]}
    ]
    unseen = select(load_entities(), "heldout")[0]
    assert scene_facts(benchmark_prompt(unseen, "red"), load_entities())["held_out"]


@pytest.mark.parametrize(
    ("name", "expected", "many"),
    [
        ("wolf", "a wolf", "wolves"),
        ("owl", "an owl", "owls"),
        ("unicorn", "a unicorn", "unicorns"),
        ("grapes", "grapes", None),
        ("octopus", "an octopus", "octopuses"),
        ("cherries", "cherries", None),
        ("fire", "fire", None),
        ("woman running", "a woman running", None),
        ("women holding hands", "women holding hands", None),
        ("face with tears of joy", "a face with tears of joy", None),
        ("snowman", "a snowman", "snowmen"),
        ("flag: Germany", "a flag of Germany", None),
        ("flag: Faroe Islands", "a flag of the Faroe Islands", None),
        ("keycap: 3", "a keycap 3", None),
        ("man: red hair", "a man with red hair", None),
        ("SOS button", "SOS button", None),
        ("strawberry", "a strawberry", "strawberries"),
        ("x-ray", "an x-ray", None),
    ],
)
def test_english(name, expected, many):
    thing = noun(named(name))
    assert with_article(thing) == expected
    assert plural(thing) == many
