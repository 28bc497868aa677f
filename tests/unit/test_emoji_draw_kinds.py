from collections.abc import Sequence

import numpy as np
import pytest

from index.errors import QueryError
from radt.corpora.emoji import GlyphRenderer, load_entities
from radt.corpora.scenes import PALETTE
from radt.evaluation.emoji_draw import plan_tasks
from radt.evaluation.emoji_draw_kinds import (
    KINDS,
    Outcome,
    Prompt,
    assign,
    judge,
    log_softmax,
    plan_prompts,
    read_kinds,
    shares,
    true_pictures,
    with_intervals,
)
from radt.evaluation.intervals import wilson
from radt.evaluation.ranking import rank_of, ranks
from radt.evaluation.reading import Figure, Reading
from tests.recognizers import TemplateRecognizer, template_recognizer

N = 8


@pytest.fixture(scope="module")
def glyphs() -> GlyphRenderer:
    return GlyphRenderer()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return plan_prompts(load_entities(), KINDS, n=N, seed=0)


@pytest.fixture(scope="module")
def recognizer(glyphs: GlyphRenderer, prompts: Sequence[Prompt]) -> TemplateRecognizer:
    asked = [entity for prompt in prompts for entity in prompt.entities]
    return template_recognizer(glyphs, [*load_entities()[::40], *asked])


def of_kind(prompts: Sequence[Prompt], kind: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind == kind]


class TestPlan:
    def test_the_same_held_out_classes_in_every_kind_each_in_noise_of_its_own(self, prompts: list[Prompt]) -> None:
        tasks = plan_tasks(load_entities(), n=N, seed=0)
        for kind in KINDS:
            some = of_kind(prompts, kind)
            assert len(some) == N
            for task, prompt in zip(tasks, some, strict=True):
                assert task.entity in prompt.entities
                assert all(entity.held_out for entity in prompt.entities)
                assert not prompt.wrong.held_out
        assert len({prompt.seed for prompt in prompts}) == len(prompts)

    def test_the_plain_kind_is_the_short_form(self, prompts: list[Prompt]) -> None:
        tasks = plan_tasks(load_entities(), n=N, seed=0)
        plain = of_kind(prompts, "ground")
        assert [(each.text, each.seed) for each in plain] == [(task.prompt, task.seed) for task in tasks]

    def test_a_small_run_is_the_beginning_of_a_large_one_and_kinds_do_not_depend_on_each_other(self) -> None:
        few, many = (plan_prompts(load_entities(), ("two", "counted"), n=n, seed=4) for n in (3, 7))
        for kind in ("two", "counted"):
            assert of_kind(few, kind) == of_kind(many, kind)[:3]
        assert plan_prompts(load_entities(), ("counted",), n=3, seed=4) == of_kind(few, "counted")

    def test_two_are_of_different_classes_in_the_order_of_the_scene(self, prompts: list[Prompt]) -> None:
        for prompt in of_kind(prompts, "two"):
            assert len(set(prompt.class_ids)) == 2
            shown = [placement.entity for placement in prompt.scene.placements]
            assert [entity.position for entity in prompt.entities] == shown

    def test_alone_names_no_ground(self, prompts: list[Prompt]) -> None:
        for prompt in of_kind(prompts, "alone"):
            assert not prompt.text.endswith("background")

    def test_two_works_for_every_held_out_class_at_once(self) -> None:
        held_out = len({entity.class_id for entity in load_entities() if entity.held_out})
        for prompt in plan_prompts(load_entities(), ("two",), n=held_out, seed=1):
            assert len(set(prompt.class_ids)) == 2

    @pytest.mark.parametrize(
        ("text", "kinds"), [("all", KINDS), ("two,ground", ("ground", "two")), (" counted ", ("counted",))]
    )
    def test_kinds_as_typed(self, text: str, kinds: tuple[str, ...]) -> None:
        assert read_kinds(text) == kinds

    @pytest.mark.parametrize("text", ["", "pair", "two,pair"])
    def test_what_is_no_kind_is_refused(self, text: str) -> None:
        with pytest.raises(QueryError, match="choose among all, ground"):
            read_kinds(text)


class TestJudge:
    @pytest.mark.parametrize("kind", KINDS)
    def test_true_pictures_are_right(
        self, kind: str, glyphs: GlyphRenderer, prompts: list[Prompt], recognizer: TemplateRecognizer
    ) -> None:
        some = of_kind(prompts, kind)
        found = shares(some, judge(recognizer, some, true_pictures(some, glyphs, 128)))
        assert found["all_right"] >= 1 - 1 / N
        assert found["agreement"] >= 1 - 1 / N
        assert ("ground" in found) == (kind != "alone")
        assert ("both_entities" in found) == (kind == "two")
        assert ("size" in found) == (kind == "sized")

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_blank_picture_has_no_entity_and_no_figure(
        self, kind: str, prompts: list[Prompt], recognizer: TemplateRecognizer
    ) -> None:
        some = of_kind(prompts, kind)
        blank = np.stack([np.full((64, 64, 3), PALETTE[prompt.scene.ground], np.uint8) for prompt in some])
        found = shares(some, judge(recognizer, some, blank))
        assert found["entity_top5"] == found["count"] == found["all_right"] == 0
        assert found.get("ground", 1.0) == 1.0
        assert found.get("place", 0.0) == 0.0

    def test_a_picture_of_something_else_is_told(
        self, glyphs: GlyphRenderer, prompts: list[Prompt], recognizer: TemplateRecognizer
    ) -> None:
        some = of_kind(prompts, "ground")
        other = np.roll(true_pictures(some, glyphs, 64), 1, axis=0)
        found = shares(some, judge(recognizer, some, other))
        assert found["entity_top1"] == found["ground"] == 0

    def test_two_that_change_places_are_both_there_and_in_the_wrong_place(
        self, glyphs: GlyphRenderer, prompts: list[Prompt], recognizer: TemplateRecognizer
    ) -> None:
        some = of_kind(prompts, "two")
        across = np.array([prompt.scene.place in ("left of", "right of") for prompt in some])
        swapped = np.stack([
            np.roll(picture, 64, axis=1 if flips else 0)  # halves change places
            for picture, flips in zip(true_pictures(some, glyphs, 128), across, strict=True)
        ])
        right, wrong = (
            shares(some, judge(recognizer, some, pictures)) for pictures in (true_pictures(some, glyphs, 128), swapped)
        )
        assert wrong["both_entities"] == pytest.approx(right["both_entities"], abs=1 / N)
        assert right["place"] == 1
        assert wrong["place"] == 0


class TestScores:
    def test_ranks_count_ties_against_the_asked_one(self) -> None:
        scores = np.array([0.5, 0.1, 0.5, 0.9])
        assert [rank_of(scores, column) for column in range(4)] == [3, 4, 3, 1]

    def test_a_judge_that_gives_no_number_is_never_right(self) -> None:
        """Or a network whose weights overflowed would score everything as right."""
        assert rank_of(np.full(4, np.nan), 2) == 4
        assert ranks(np.array([[0.5, np.nan, 0.1], [np.nan, 0.2, 0.1]]), np.array([0, 0])).tolist() == [2, 3]

    def test_softmax_sums_to_one_and_survives_large_logits(self) -> None:
        found = np.exp(log_softmax(np.array([[1000.0, 999.0], [-5.0, -5.0]])))
        assert found.sum(axis=1) == pytest.approx([1, 1])
        assert found[1] == pytest.approx([0.5, 0.5])

    def test_each_class_gets_a_figure_of_its_own(self) -> None:
        scores = np.array([[0.9, 0.8], [0.7, 0.1]])
        assert assign(scores, [0, 1]) == (1, 0)  # 0.7 + 0.8 beats 0.9 + 0.1
        assert assign(np.array([[0.1, 0.9]]), [0, 1]) == (None, 0)
        assert assign(np.zeros((0, 2)), [0, 1]) == (None, None)
        assert assign(np.array([[0.0, 0.9], [0.2, 0.1], [0.8, 0.3]]), [0, 1]) == (2, 0)

    def test_shares_by_hand(self, prompts: list[Prompt]) -> None:
        some = of_kind(prompts, "two")[:4]
        cases = [
            outcome(ranks=(1, 1), agrees={"count": True, "ground": True, "place": True}),
            outcome(ranks=(1, 3), agrees={"count": True, "ground": True, "place": True}),
            outcome(ranks=(4, 1), agrees={"count": False, "ground": True, "place": False}),
            outcome(ranks=(9, 9), agrees={"count": False, "ground": False, "place": False}),
        ]
        assert shares(some, cases) == {
            "entity_top1": 0.5,
            "entity_top5": 0.75,
            "both_entities": 0.25,
            "one_entity": 0.75,
            "count": 0.5,
            "ground": 0.75,
            "place": 0.5,
            "agreement": 0.5,
            "all_right": 0.25,
        }

    def test_a_fact_is_counted_among_the_prompts_that_ask_for_it(self, prompts: list[Prompt]) -> None:
        some = of_kind(prompts, "sized")[:2]
        cases = [
            outcome(ranks=(1,), agrees={"count": True, "size": True, "place": False}),
            outcome(ranks=(1,), agrees={"count": True, "size": False}),
        ]
        found = shares(some, cases)
        assert (found["place"], found["n_place"]) == (0.0, 1)
        assert "n_size" not in found
        assert with_intervals(found, 2)["place"]["high"] == wilson(0.0, 1)[1]
        assert with_intervals(found, 2)["place"]["n"] == 1  # one of the two asks for a place
        assert "n" not in with_intervals(found, 2)["size"]
        assert with_intervals(found, 2)["size"]["high"] == wilson(0.5, 2)[1]

    def test_an_outcome_survives_json(self) -> None:
        case = outcome(ranks=(2, 5), agrees={"count": True})
        assert Outcome.from_json(case.to_json()) == case


def outcome(*, ranks: tuple[int, ...], agrees: dict[str, bool]) -> Outcome:
    figures = (Figure(center=(0.5, 0.25), side=0.4), Figure(center=(0.5, 0.75), side=0.4))
    return Outcome(reading=Reading(ground="red", figures=figures), ranks=ranks, guesses=(3, 4), agrees=agrees)
