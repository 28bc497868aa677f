import numpy as np
import pytest
from PIL import Image

from radt.corpora.emoji import Entity, GlyphRenderer, load_entities
from radt.corpora.scenes import (
    COUNTED_CENTERS,
    COUNTED_SIDE,
    PALETTE,
    PLACES,
    RELATIONS,
    Placement,
    Scene,
    render_scene,
    sample_scene,
)
from radt.evaluation.reading import Figure, read, relation_holds


@pytest.fixture(scope="module")
def glyphs() -> GlyphRenderer:
    return GlyphRenderer()


def by_name(name: str) -> Entity:
    return next(entity for entity in load_entities() if entity.name == name)


def show(glyphs: GlyphRenderer, *figures: tuple[str, tuple[float, float], float], ground: str = "teal") -> np.ndarray:
    """Figures by name, centre and side."""
    placements = tuple(
        Placement(entity=by_name(name).position, box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2))
        for name, (x, y), side in figures
    )
    return render_scene(Scene(kind="alone", ground=ground, placements=placements, caption=""), glyphs, 128)


class TestTrueScenes:
    """The ceiling of every figure that rests on reading."""

    @pytest.mark.parametrize(
        ("size", "kind", "least"),
        [
            (128, "alone", 0.98),
            (128, "placed", 0.98),
            (128, "sized", 0.93),
            (128, "counted", 0.95),
            (128, "two", 0.95),
            (32, "alone", 0.95),
            (32, "placed", 0.98),
            (32, "sized", 0.93),
            (32, "counted", 0.95),
            (32, "two", 0.92),
        ],
    )
    def test_a_true_scene_read_gives_its_facts(self, glyphs: GlyphRenderer, size: int, kind: str, least: float) -> None:
        rng = np.random.default_rng(5)
        table, right = load_entities(), []
        for _ in range(60):
            pair = [table[int(i)] for i in rng.choice(len(table), 2, replace=False)]
            scene = sample_scene(rng, pair, kinds={kind: 1.0})
            reading = read(render_scene(scene, glyphs, size))
            largest = reading.largest
            right.append(
                (reading.ground, reading.count) == (scene.ground, scene.count)
                and (scene.place not in PLACES or (largest is not None and largest.place == scene.place))
                and (scene.size is None or (largest is not None and largest.size == scene.size))
            )
        assert np.mean(right) >= least

    @pytest.mark.parametrize("ground", PALETTE)
    @pytest.mark.parametrize("size", [16, 32, 128])
    def test_a_blank_picture_has_its_ground_and_no_figure(self, ground: str, size: int) -> None:
        reading = read(np.full((size, size, 3), PALETTE[ground], np.uint8))
        assert (reading.ground, reading.count, reading.largest) == (ground, 0, None)

    def test_specks_and_faint_noise_are_no_figures(self) -> None:
        rng = np.random.default_rng(0)
        picture = np.clip(np.array(PALETTE["blue"]) + rng.normal(0, 3, (128, 128, 3)), 0, 255).astype(np.uint8)
        picture[40, 40] = picture[90:92, 20:22] = 255
        assert read(picture).count == 0


class TestFigures:
    def test_parts_of_one_emoji_are_one_figure(self, glyphs: GlyphRenderer) -> None:
        for name in ("eyes", "footprints", "red exclamation mark", "musical notes"):
            assert read(show(glyphs, (name, (0.5, 0.5), 0.78))).count == 1

    def test_several_of_several_parts_are_counted(self, glyphs: GlyphRenderer) -> None:
        for count, centers in COUNTED_CENTERS.items():
            picture = show(glyphs, *[("red exclamation mark", center, COUNTED_SIDE) for center in centers])
            assert read(picture).count == count

    def test_a_missing_one_of_four_leaves_three(self, glyphs: GlyphRenderer) -> None:
        centers = COUNTED_CENTERS[4][:3]
        reading = read(show(glyphs, *[("wolf", center, COUNTED_SIDE) for center in centers]))
        assert reading.count == 3
        found = sorted(figure.place for figure in reading.figures)
        assert found == ["bottom left", "top left", "top right"]

    @pytest.mark.parametrize("name", ["smiling face with smiling eyes", "wolf", "pink heart"])
    def test_several_alike_are_counted_though_they_are_blurred(self, glyphs: GlyphRenderer, name: str) -> None:
        """As a network draws them, with halos and speckles. What they show tells them from one thing."""
        for centers in COUNTED_CENTERS.values():
            picture = Image.fromarray(show(glyphs, *[(name, center, COUNTED_SIDE + 0.03) for center in centers]))
            coarse = picture.resize((26, 26), Image.Resampling.LANCZOS).resize((32, 32), Image.Resampling.BICUBIC)
            assert read(np.asarray(coarse)).count == len(centers)
            speckled = np.asarray(coarse) + np.random.default_rng(0).normal(scale=4, size=(32, 32, 3))
            assert read(speckled.clip(0, 255).astype(np.uint8)).count == len(centers)

    @pytest.mark.parametrize("name", ["red square", "white large square", "window", "waffle"])
    def test_one_large_thing_whose_parts_are_alike_is_one(self, glyphs: GlyphRenderer, name: str) -> None:
        assert read(show(glyphs, (name, (0.5, 0.5), 0.96))).count == 1

    def test_where_and_how_large(self, glyphs: GlyphRenderer) -> None:
        (figure,) = read(show(glyphs, ("wolf", (0.3, 0.6), 0.4))).figures
        assert figure.center == pytest.approx((0.3, 0.6), abs=0.01)
        assert figure.side == pytest.approx(0.4, abs=0.02)
        left, top, right, bottom = figure.crop
        assert right - left == pytest.approx(bottom - top)
        assert right - left > figure.side

    @pytest.mark.parametrize("place", PLACES)
    def test_mirrors_move_the_place_with_the_picture(self, glyphs: GlyphRenderer, place: str) -> None:
        picture = show(glyphs, ("wolf", PLACES[place], 0.45))
        swapped = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

        def turned(words: tuple[str, str]) -> str:
            return " ".join(swapped[word] if word in words else word for word in place.split())

        across, down = read(picture[:, ::-1]).largest, read(picture[::-1]).largest
        assert across is not None
        assert down is not None
        assert across.place == turned(("left", "right"))
        assert down.place == turned(("top", "bottom"))

    def test_figures_come_from_the_top_and_from_the_left(self, glyphs: GlyphRenderer) -> None:
        picture = show(glyphs, *[("wolf", center, COUNTED_SIDE) for center in COUNTED_CENTERS[4]])
        assert [figure.place for figure in read(picture).figures] == [
            "top left",
            "top right",
            "bottom left",
            "bottom right",
        ]


class TestRelations:
    @pytest.mark.parametrize("name", RELATIONS)
    def test_exactly_one_holds_and_swapping_turns_it_round(self, name: str) -> None:
        first, second = (Figure(center=center, side=0.47) for center in RELATIONS[name])
        assert [other for other in RELATIONS if relation_holds(other, first, second)] == [name]
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[name]
        assert relation_holds(opposite, second, first)
        assert not relation_holds(name, second, first)
