import numpy as np
import PIL.Image
import pytest
import torch

from index.errors import QueryError
from radt.corpora.emoji import Entity, GlyphRenderer, load_entities, render_rendition, rendition
from radt.corpora.scenes import PALETTE, benchmark_prompt, compose, placement_layer
from radt.evaluation.color import border_color, lab_from_srgb, nearest_color
from radt.evaluation.emoji_draw import (
    Drawing,
    EmojiDrawBench,
    Shown,
    Verdict,
    drawing_shares,
    mislead,
    plan_tasks,
    retrieval_shares,
    verdict_shares,
)
from radt.evaluation.intervals import wilson
from radt.evaluation.recognizer import Recognizer, window
from radt.neighbors import Neighbor, to_rgb8

SIZE = 32


@pytest.fixture(scope="module")
def glyphs() -> GlyphRenderer:
    return GlyphRenderer()


@pytest.fixture(scope="module")
def candidates() -> list[Entity]:
    return list(load_entities()[::6])


@pytest.fixture(scope="module")
def bench(glyphs: GlyphRenderer, candidates: list[Entity]) -> EmojiDrawBench:
    return EmojiDrawBench(plan_tasks(candidates, n=24, seed=0), glyphs, candidates, size=SIZE, seed=0)


class TestWilson:
    def test_known_values(self) -> None:
        # Newcombe 1998, table I, method 3 (score method without continuity correction).
        assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
        assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
        assert wilson(0.0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
        assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
    def test_it_holds_the_share_stays_in_range_and_mirrors(self, share: float) -> None:
        low, high = wilson(share, 40)
        assert 0 <= low <= share <= high <= 1
        assert wilson(1 - share, 40) == pytest.approx((1 - high, 1 - low))

    def test_more_trials_narrow_it(self) -> None:
        widths = [high - low for low, high in (wilson(0.3, n) for n in (10, 100, 1000))]
        assert widths == sorted(widths, reverse=True)


class TestColor:
    @pytest.mark.parametrize(
        ("rgb", "lab"),
        [  # the sRGB primaries under D65
            ((255, 255, 255), (100, 0, 0)),
            ((0, 0, 0), (0, 0, 0)),
            ((255, 0, 0), (53.24, 80.09, 67.20)),
            ((0, 255, 0), (87.73, -86.18, 83.18)),
            ((0, 0, 255), (32.30, 79.19, -107.86)),
            ((119, 119, 119), (50.03, 0, 0)),
            ((3, 3, 3), (0.82, 0, 0)),  # the straight part of both curves
        ],
    )
    def test_known_values(self, rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
        assert lab_from_srgb(np.array(rgb)) == pytest.approx(lab, abs=0.01)

    @pytest.mark.parametrize("name", PALETTE)
    def test_a_palette_colour_keeps_its_name_under_noise(self, name: str) -> None:
        for shift in (-8, 0, 8):
            assert nearest_color(np.clip(np.array(PALETTE[name]) + shift, 0, 255), PALETTE) == name

    def test_the_border_is_the_outermost_ring_and_few_odd_pixels_do_not_move_it(self) -> None:
        picture = np.full((8, 8, 3), 200, np.uint8)
        picture[1:-1, 1:-1] = 0
        picture[0, :5] = 0
        assert border_color(picture).tolist() == [200, 200, 200]


class TestRecognizer:
    def test_distances_are_those_of_drawing_and_subtracting(self, glyphs: GlyphRenderer) -> None:
        entities = list(load_entities()[:40:4])
        box, ground = benchmark_prompt(entities[0], "teal").placements[0].box, PALETTE["teal"]
        pictures = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
        recognizer = Recognizer(glyphs, entities, box=box, size=SIZE)
        found = recognizer.distances(pictures, ground)
        rows, columns = window(box, SIZE)
        for i, picture in enumerate(pictures):
            for j, entity in enumerate(recognizer.entities):
                drawn = compose(placement_layer(glyphs.glyph(entity), box, SIZE), ground)
                difference = drawn[rows, columns].astype(int) - picture[rows, columns]
                assert found[i, j] == (difference**2).sum()

    def test_a_class_is_as_near_as_its_best_member(self, glyphs: GlyphRenderer) -> None:
        table = load_entities()
        twins = next(
            [e for e in table if e.class_id == class_id]
            for class_id in (e.class_id for e in table)
            if sum(e.class_id == class_id for e in table) > 1
        )
        entities = [*table[:5], *twins]
        box = benchmark_prompt(entities[0], "red").placements[0].box
        recognizer = Recognizer(glyphs, entities, box=box, size=SIZE)
        distances = np.arange(len(entities), dtype=np.float64)[None]
        by_class = recognizer.by_class(distances)
        assert by_class.shape == (1, len({e.class_id for e in entities}))
        members = [i for i, e in enumerate(recognizer.entities) if e.class_id == twins[0].class_id]
        assert len(members) == len(twins)
        assert by_class[0, list(recognizer.classes).index(twins[0].class_id)] == min(members)

    def test_a_tie_is_no_recognition(self, glyphs: GlyphRenderer) -> None:
        entities = list(load_entities()[:3])
        recognizer = Recognizer(glyphs, entities, box=(0.0, 0.0, 1.0, 1.0), size=8)
        distances = np.array([[5.0, 5.0, 9.0], [1.0, 5.0, 9.0]])
        assert recognizer.ranks(distances, [int(recognizer.classes[0])] * 2).tolist() == [2, 1]

    def test_the_window_is_every_pixel_that_the_box_touches(self) -> None:
        assert window((0.25, 0.5, 0.75, 1.0), 8) == (slice(4, 8), slice(2, 6))
        assert window((0.11, -0.1, 0.89, 1.1), 32) == (slice(0, 32), slice(3, 29))


class TestTasks:
    def test_held_out_classes_each_once_on_balanced_grounds(self) -> None:
        tasks = plan_tasks(load_entities(), n=100, seed=3)
        assert all(task.entity.held_out and not task.wrong.held_out for task in tasks)
        assert len({task.entity.class_id for task in tasks}) == 100
        counts = [sum(task.scene.ground == name for task in tasks) for name in PALETTE]
        assert max(counts) - min(counts) <= 1
        assert [task.seed for task in tasks] == list(range(3, 103))

    def test_by_seed_alone_and_a_small_run_is_the_beginning_of_a_large_one(self) -> None:
        table = load_entities()
        assert plan_tasks(table, n=10, seed=0) == plan_tasks(table, n=30, seed=0)[:10]
        assert plan_tasks(table, n=10, seed=0) != plan_tasks(table, n=10, seed=1)

    def test_the_wrong_one_takes_every_place(self) -> None:
        places = {int(task.wrong_place * 2) for task in plan_tasks(load_entities(), n=30, seed=0)}
        assert places == {0, 1}

    @pytest.mark.parametrize("n", [0, 10_000])
    def test_as_many_as_there_are(self, n: int) -> None:
        with pytest.raises(QueryError, match="n must lie between 1 and"):
            plan_tasks(load_entities(), n=n, seed=0)


class TestJudging:
    """What scores and what must not."""

    def test_the_true_scenes_score_full_marks(self, bench: EmojiDrawBench) -> None:
        assert bench.ceiling() == {
            "entity_top1": 1.0,
            "entity_top5": 1.0,
            "entity_top1_by_pixels": 1.0,
            "entity_top5_by_pixels": 1.0,
            "ground_color": 1.0,
        }

    def test_a_blank_picture_has_its_ground_and_nothing_else(self, bench: EmojiDrawBench) -> None:
        blank = np.stack([np.full((SIZE, SIZE, 3), PALETTE[task.scene.ground], np.uint8) for task in bench.tasks])
        shares = verdict_shares(bench.tasks, bench.judge(blank))
        assert shares["ground_color"] == 1.0
        assert shares["entity_top1"] == 0.0  # chance is 1 in 300
        assert shares["entity_top5"] <= 1 / 12

    def test_a_pasted_neighbour_fails_on_the_ground_and_mostly_on_the_entity(
        self, bench: EmojiDrawBench, glyphs: GlyphRenderer
    ) -> None:
        drawings = [rendition(task.entity, 1) for task in bench.tasks]
        pasted = np.stack([
            render_rendition(glyphs.glyph(task.entity), drawing, SIZE)
            for task, drawing in zip(bench.tasks, drawings, strict=True)
        ])
        verdicts = bench.judge(pasted)
        for task, drawing, verdict in zip(bench.tasks, drawings, verdicts, strict=True):
            if nearest_color(np.array(drawing.ground), PALETTE) != task.scene.ground:
                assert verdict.ground != task.scene.ground
        shares = verdict_shares(bench.tasks, verdicts)
        assert shares["ground_color"] <= 0.25
        assert shares["entity_top1"] <= 0.5

    def test_another_entity_or_another_ground_is_told(self, bench: EmojiDrawBench) -> None:
        other = np.roll(bench.truths, 1, axis=0)
        shares = verdict_shares(bench.tasks, bench.judge(other))
        assert shares["entity_top1"] == shares["ground_color"] == 0.0

    def test_noise_does_not_matter_much(self, bench: EmojiDrawBench) -> None:
        noise = np.random.default_rng(0).normal(0, 12, bench.truths.shape)
        noisy = np.clip(bench.truths + noise, 0, 255).astype(np.uint8)
        shares = verdict_shares(bench.tasks, bench.judge(noisy))
        assert shares["entity_top1"] >= 0.9
        assert shares["ground_color"] == 1.0


class TestShares:
    """Counted by hand on four tasks."""

    def test_verdicts_and_what_was_shown(self, bench: EmojiDrawBench) -> None:
        tasks = bench.tasks[:4]
        right = [task.entity.class_id for task in tasks]
        wrong = tasks[0].wrong
        cases = [
            drawing(rank=1, guess=tasks[0].entity, ground=tasks[0].scene.ground, classes=[right[0], right[0]]),
            drawing(rank=5, guess=wrong, ground=tasks[1].scene.ground, classes=[right[1], wrong.class_id]),
            drawing(rank=6, guess=wrong, ground="none", classes=[None, None]),
            drawing(rank=2, guess=wrong, ground=tasks[3].scene.ground, classes=[]),
        ]
        assert drawing_shares(tasks, cases) == {
            "entity_top1": 0.25,
            "entity_top5": 0.75,
            "entity_top1_by_pixels": 0.25,
            "entity_top5_by_pixels": 0.75,
            "ground_color": 0.75,
            "right_neighbor": 0.5,
            "drew_wrong_neighbor": 0.25,
        }
        assert retrieval_shares(tasks, [case.shown for case in cases]) == {
            "recall_at_k": 0.5,
            "precision_at_k": (1 + 0.5) / 4,
            "all_right": 0.25,
        }


class TestMislead:
    def test_one_neighbour_is_exchanged_for_the_wrong_picture_with_its_own_caption(
        self, bench: EmojiDrawBench, glyphs: GlyphRenderer
    ) -> None:
        for task in bench.tasks:
            shown = tuple(shown_class(task.entity.class_id) for _ in range(3))
            misled = mislead(glyphs, task, shown, (SIZE, SIZE))
            place = int(task.wrong_place * 3)
            assert [a is b for a, b in zip(misled, shown, strict=True)] == [i != place for i in range(3)]
            drawn = render_rendition(glyphs.glyph(task.wrong), rendition(task.wrong, task.wrong_rendition), 128)
            assert torch.equal(misled[place].neighbor.pixels, to_rgb8(PIL.Image.fromarray(drawn), (SIZE, SIZE)))
            assert misled[place].neighbor.caption == task.wrong.caption
            assert misled[place].class_id == task.wrong.class_id

    def test_where_nothing_was_found_the_wrong_one_stands_alone(self, bench: EmojiDrawBench) -> None:
        misled = mislead(bench.glyphs, bench.tasks[0], (), (SIZE, SIZE))
        assert [each.class_id for each in misled] == [bench.tasks[0].wrong.class_id]


def shown_class(class_id: int | None) -> Shown:
    blank = torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8)
    return Shown(neighbor=Neighbor(id="1", caption="a thing", pixels=blank), class_id=class_id)


def drawing(*, rank: int, guess: Entity, ground: str, classes: list[int | None]) -> Drawing:
    return Drawing(
        picture=np.zeros((SIZE, SIZE, 3), np.uint8),
        shown=tuple(shown_class(class_id) for class_id in classes),
        verdict=Verdict(rank=rank, guess=guess, ground=ground),
        copy_similarity=None,
    )
