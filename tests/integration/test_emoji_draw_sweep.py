"""EmojiDrawBench over kinds and settings, with an untrained model and a recogniser that needs no training."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from index.cli import run
from index.embedder import ClipEmbedder
from index.errors import KnowledgeBaseError, QueryError
from index.knowledge_base import KnowledgeBase
from radt.cli import app
from radt.corpora.emoji import GlyphRenderer, load_entities, render_rendition, rendition
from radt.evaluation import emoji_draw_sweep_sheet
from radt.evaluation.emoji_draw_kinds import judge, plan_prompts
from radt.evaluation.emoji_draw_sweep import (
    SWEEP_K,
    KindsBench,
    Point,
    new_entity_models,
    plan_points,
    run_sweep,
    summary,
)
from radt.evaluation.emoji_draw_sweep_sheet import tables, write_sweep
from radt.evaluation.intervals import wilson
from radt.evaluation.results import Estimate, Result
from radt.pipeline import TextToImage
from radt.recognizer_network import RecognizerConfig, RecognizerNetwork, save_recognizer
from tests.integration.conftest import save_tiny_bundle
from tests.recognizers import template_recognizer

N, SIZE = 2, 32
TIMED = ("seconds_to_draw", "seconds_to_find", "seconds_per_image", "seconds_per_query")


@pytest.fixture(scope="module")
def glyphs():
    return GlyphRenderer()


@pytest.fixture(scope="module")
def prompts():
    return plan_prompts(load_entities(), ("ground", "two"), n=N, seed=0)


@pytest.fixture(scope="module")
def bench(prompts, glyphs):
    asked = [entity for prompt in prompts for entity in prompt.entities]
    return KindsBench(prompts, glyphs, template_recognizer(glyphs, [*load_entities()[::60], *asked]), size=SIZE)


@pytest.fixture(scope="module")
def model_folder(tiny_clip, tmp_path_factory):
    return save_tiny_bundle(tmp_path_factory.mktemp("bundles") / "small", tiny_clip, image_size=SIZE)


@pytest.fixture(scope="module")
def emoji_kb(model_folder, bench, glyphs, tmp_path_factory):
    kb = KnowledgeBase.create(tmp_path_factory.mktemp("bases") / "emoji", ClipEmbedder.load(str(model_folder)))
    entities = {e.position: e for e in [*(e for p in bench.prompts for e in p.entities), *load_entities()[:6]]}
    for entity in entities.values():
        pictures = [render_rendition(glyphs.glyph(entity), rendition(entity, number), 32) for number in (0, 1, 2)]
        kb.add([Image.fromarray(picture) for picture in pictures], entity.caption, metadata=entity.facts())
    kb.build_search("exact", duplicates=False)
    return kb


@pytest.fixture(scope="module")
def model(model_folder, emoji_kb):
    return TextToImage.load(model_folder, kb=emoji_kb, device="cpu")


@pytest.fixture(scope="module")
def settings(model):
    return model.settings(by="bm25", decompose="phrases", steps=1)


@pytest.fixture
def drawn(monkeypatch, bench):
    """True scenes in the place of drawing; the calls, each a list of requests. Sheets have one row, to be quick."""
    monkeypatch.setattr(emoji_draw_sweep_sheet, "ROWS_KEPT", 1)
    truths = {prompt.text: bench.truths[prompt.kind][place % N] for place, prompt in enumerate(bench.prompts)}
    calls = []

    def draw_many(_, requests, **__):
        calls.append(list(requests))
        yield from (torch.from_numpy(truths[request.prompt]) for request in requests)

    monkeypatch.setattr(TextToImage, "draw_many", draw_many)
    return calls


class TestPoints:
    def test_each_sweep_changes_one_thing(self, settings):
        assert [point.settings.k for point in plan_points("k", settings)] == [settings.k, *SWEEP_K[1:]]
        assert [point.source for point in plan_points("k", settings)] == ["none", *["found"] * (len(SWEEP_K) - 1)]
        shares = plan_points("text-share", settings)
        assert [point.settings.text_share for point in shares] == [point.x for point in shares]
        assert (shares[0].x, shares[-1].x) == (0, 1)
        assert [point.settings.by for point in plan_points("by", settings)] == ["clip", "bm25", "hybrid"]
        for sweep in ("k", "text-share", "by", "neighbors", "arms", "new-entity"):
            names = [point.name for point in plan_points(sweep, settings)]
            assert len(set(names)) == len(names) > 1

    def test_there_is_no_share_where_both_are_strengthened_at_once(self, settings):
        with pytest.raises(QueryError, match="--guidance interleaved"):
            plan_points("text-share", replace(settings, guidance="joint"))

    def test_where_neighbours_come_from(self, bench, model, settings):
        def rows(source, kind):
            # By words nothing is like an emoji but itself, so without it there would be nothing to see.
            asked = replace(settings, by="clip") if source == "removed" else settings
            return bench.neighbors(model, Point(name="", source=source, settings=asked), bench.of_kind(kind))

        for kind in bench.kinds:
            for prompt, by_hand, one_wrong, removed in zip(
                bench.of_kind(kind),
                rows("by_hand", kind),
                rows("by_hand_one_wrong", kind),
                rows("removed", kind),
                strict=True,
            ):
                assert len(by_hand) == settings.k
                assert {each.class_id for each in by_hand} == set(prompt.class_ids)
                assert len({each.neighbor.pixels.numpy().tobytes() for each in by_hand}) == settings.k
                changed = [a.class_id != b.class_id for a, b in zip(by_hand, one_wrong, strict=True)]
                assert sum(changed) == 1
                assert prompt.wrong.class_id in {each.class_id for each in one_wrong}
                assert not {each.class_id for each in removed} & set(prompt.class_ids)
                assert len(removed) > 0
            assert rows("none", kind) == [() for _ in range(N)]
            found = rows("found", kind)
            asked = [set(prompt.class_ids) for prompt in bench.of_kind(kind)]
            assert all({each.class_id for each in row} & ids for ids, row in zip(asked, found, strict=True))
            for own, other, swapped in zip(found, [*found[1:], *found[:1]], rows("swapped", kind), strict=True):
                assert [each.neighbor.caption for each in swapped] == [each.neighbor.caption for each in own]
                assert [each.class_id for each in swapped] == [each.class_id for each in other]
                pixels = [(a.neighbor.pixels, b.neighbor.pixels) for a, b in zip(swapped, other, strict=True)]
                assert all(torch.equal(a, b) for a, b in pixels)


class TestRun:
    def test_true_scenes_score_their_ceiling_and_noise_is_the_same_in_every_arm(self, bench, model, settings, drawn):
        report = run_sweep(bench, model, "arms", settings)
        document = report.to_json()
        assert document["n"] == 2 * N
        for name in ("with_retrieval", "without_retrieval", "with_one_wrong"):
            for kind, ceiling in report.ceiling.items():
                found = report.overall[name] if kind == "all" else report.by_kind[name][kind]
                for key, value in ceiling.items():
                    assert key.startswith("n_") or found[key]["value"] == value
            assert document[name]["entity_top1"] == 1.0
        seeds = [[(request.prompt, request.seed) for request in call] for call in drawn]
        assert seeds[0] == seeds[2] == seeds[4]
        assert len({seed for _, seed in [*seeds[0], *seeds[1]]}) == 2 * N
        assert all(not request.neighbors for request in drawn[2])

    def test_the_arms_begin_with_the_table_that_is_quoted_a_row_a_kind(self, bench, model, settings, drawn):
        report = run_sweep(bench, model, "arms", settings)
        first = emoji_draw_sweep_sheet.tables(report)[0]
        assert first.columns[:4] == ("", "entity top-1", "without", "one wrong")
        assert [row[0] for row in first.rows] == list(report.kinds)
        for kind, entity, *cells in first.rows:
            right = report.by_kind["with_retrieval"][kind]
            assert entity == Estimate(**{part: right["entity_top1"][part] for part in ("value", "low", "high")})
            arms = [report.by_kind[arm][kind]["entity_top1"] for arm in ("without_retrieval", "with_one_wrong")]
            facts = [right.get(key) for key in ("both_entities", "ground", "place", "count")]
            assert cells == [share and f"{share['value']:.2f}" for share in (*arms, *facts)]
        assert "by kind" not in emoji_draw_sweep_sheet.tables(run_sweep(bench, model, "by", settings))[0].title

    def test_a_sweep_that_was_killed_goes_on_and_is_the_unbroken_one(
        self, bench, model, settings, drawn, tmp_path, monkeypatch
    ):
        whole = run_sweep(bench, model, "k", settings, out=tmp_path / "whole")
        assert len(drawn) == 2 * len(SWEEP_K)
        done, measure = [], KindsBench.measure

        def dies(self, model, point, kind, on_unit):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append((point.name, kind))
            return measure(self, model, point, kind, on_unit)

        with monkeypatch.context() as patch:
            patch.setattr(KindsBench, "measure", dies)
            with pytest.raises(KeyboardInterrupt):
                run_sweep(bench, model, "k", settings, out=tmp_path / "cut")
        drawn.clear()
        resumed = run_sweep(bench, model, "k", settings, out=tmp_path / "cut")
        assert len(drawn) == 2 * len(SWEEP_K) - 3
        assert without(resumed.to_json(), TIMED) == without(whole.to_json(), TIMED)
        drawn.clear()
        run_sweep(bench, model, "k", settings, out=tmp_path / "cut")
        assert drawn == []

    def test_what_is_kept_of_another_measurement_is_not_taken(
        self, bench, model, settings, drawn, tmp_path, emoji_kb, monkeypatch
    ):
        run_sweep(bench, model, "by", settings, out=tmp_path)
        for other in (
            (bench, replace(settings, steps=2)),
            (KindsBench(bench.prompts[1:], bench.glyphs, bench.recognizer, size=SIZE), settings),
        ):
            drawn.clear()
            run_sweep(other[0], model, "by", other[1], out=tmp_path)
            assert drawn
        drawn.clear()
        run_sweep(bench, model, "by", settings, out=tmp_path)
        assert drawn
        drawn.clear()
        run_sweep(bench, model, "by", replace(settings, batch_size=7), out=tmp_path)  # how many at once is no matter
        assert not drawn
        (tmp_path / "points" / "by=clip.two.json").write_text("{half")
        run_sweep(bench, model, "by", settings, out=tmp_path)
        assert [len(call) for call in drawn] == [N]
        drawn.clear()
        with monkeypatch.context() as patch:  # another one at its path, with as many pairs from the same embedder
            patch.setattr(emoji_kb, "manifest", replace(emoji_kb.manifest, created="2026-01-01T00:00:00+00:00"))
            run_sweep(bench, model, "by", settings, out=tmp_path)
        assert drawn

    def test_the_files_are_a_curve_a_page_and_results(self, bench, model, settings, drawn, tmp_path):
        report = run_sweep(bench, model, "text-share", settings, out=tmp_path)
        written = write_sweep(report, tmp_path)
        with Image.open(tmp_path / "text-share.png") as curve:
            assert curve.width > 300
            assert len(np.unique(np.asarray(curve.convert("RGB")).reshape(-1, 3), axis=0)) > 10
        page = (tmp_path / "text-share.md").read_text()
        assert "true scenes" in page
        assert "| text-share=0.4 |" in page
        result = Result.load(written[-1])
        assert result.kind == "emoji-draw-text-share"
        (plot,) = result.plots
        assert plot.lines[0].x == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        assert json.loads((tmp_path / "text-share.json").read_text()) == json.loads(json.dumps(result.data))
        with Image.open(tmp_path / "points" / "text-share=0.two.png") as sheet:
            assert sheet.height > 300
        assert len(result.pictures) >= len(report.points) * len(report.kinds)  # a report shows every sheet
        assert all((tmp_path / picture.file).is_file() for picture in result.pictures)

    def test_what_went_wrong_has_a_sheet_of_its_own(self, bench, model, settings, drawn, tmp_path, monkeypatch):
        draw = KindsBench.draw

        def draws_the_last_one_blank(self, model, point, kind, on_unit):
            found, *seconds = draw(self, model, point, kind, on_unit)
            pictures = found.pictures.copy()
            pictures[-1] = 0
            outcomes = (*found.outcomes[:-1], *judge(self.recognizer, self.of_kind(kind)[-1:], pictures[-1:]))
            return replace(found, pictures=pictures, outcomes=outcomes), *seconds

        sheets, draw_sheet = [], emoji_draw_sweep_sheet.draw_sheet
        monkeypatch.setattr(KindsBench, "draw", draws_the_last_one_blank)
        monkeypatch.setattr(
            emoji_draw_sweep_sheet, "draw_sheet", lambda sheet: sheets.append(sheet) or draw_sheet(sheet)
        )
        result = Result.load(write_sweep(run_sweep(bench, model, "arms", settings, out=tmp_path), tmp_path)[-1])
        shown = [picture.file for picture in result.pictures if "failures" in picture.file]
        assert shown == [f"points/with_retrieval.{kind}.failures.png" for kind in bench.kinds]
        assert all((tmp_path / file).is_file() for file in shown)
        assert [[row.prompt for row in sheet.rows] for sheet in sheets if "went wrong" in sheet.subtitle] == [
            [bench.of_kind(kind)[-1].text] for kind in bench.kinds
        ]
        (tmp_path / shown[0]).unlink()  # a point may be kept without all of its sheets, and is shown with the others
        kept = Result.load(write_sweep(run_sweep(bench, model, "arms", settings, out=tmp_path), tmp_path)[-1])
        assert [each.file for each in kept.pictures] == [each.file for each in result.pictures if each.file != shown[0]]
        assert shown[0] not in (tmp_path / "arms.md").read_text()

    def test_pictures_of_another_font_are_drawn_again_where_glyphs_decide(
        self, bench, model, settings, drawn, tmp_path
    ):
        class OtherFont(dict):
            def __missing__(self, position):
                return bench.glyphs[position].transpose(Image.Transpose.FLIP_LEFT_RIGHT)

        run_sweep(bench, model, "neighbors", settings, out=tmp_path)
        drawn.clear()
        run_sweep(
            KindsBench(bench.prompts, OtherFont(), bench.recognizer, size=SIZE),
            model,
            "neighbors",
            settings,
            out=tmp_path,
        )
        assert len(drawn) == len(bench.kinds) * len(("by_hand", "by_hand_one_wrong", "one_wrong"))

    def test_one_prompt_has_nobody_to_exchange_pictures_with(self, bench, model, settings, drawn):
        one = KindsBench(bench.of_kind("two")[:1], bench.glyphs, bench.recognizer, size=SIZE)
        with pytest.raises(QueryError, match="give -n 2"):
            run_sweep(one, model, "neighbors", settings)
        assert not drawn

    def test_what_goes_with_neighbours_is_counted_among_the_prompts_that_have_some(self, bench):
        prompts = [bench.prompts[0]] * 4
        outcome = judge(bench.recognizer, prompts[:1], bench.truths["ground"][:1])[0]
        own = prompts[0].class_ids[0]
        rows = [
            {"class_ids": [own], "shown": shown, "copy_similarity": copy, **outcome.to_json()}
            for shown, copy in (([own], 0.99), ([own], 0.5), ([], None), ([], None))
        ]
        found = summary(prompts, {"prompts": rows, "seconds_to_draw": 1.0, "seconds_to_find": 1.0})
        assert (found["n"], found["found"]["value"]) == (4, 0.5)
        assert found["drew_shown"] == dict(zip(("value", "low", "high"), (1.0, *wilson(1.0, 2)), strict=True)) | {
            "n": 2
        }
        assert found["copied"] == dict(zip(("value", "low", "high"), (0.5, *wilson(0.5, 2)), strict=True)) | {"n": 2}

    def test_a_picture_without_a_figure_shows_no_neighbour_whatever_that_is(self, bench):
        (outcome,) = judge(bench.recognizer, bench.prompts[:1], np.zeros_like(bench.truths["ground"][:1]))
        row = {"class_ids": [1], "shown": [None, 1], "copy_similarity": None, **outcome.to_json()}
        found = summary(bench.prompts[:1], {"prompts": [row], "seconds_to_draw": 1.0, "seconds_to_find": 1.0})
        assert row["figures"] == []
        assert found["drew_shown"]["value"] == 0

    def test_kinds_that_ask_for_the_same_classes_are_no_more_trials_than_classes(self, bench, model, settings, drawn):
        report = run_sweep(bench, model, "arms", settings)
        own = report.by_kind["with_retrieval"]["ground"]["entity_top1"]
        together = report.overall["with_retrieval"]["entity_top1"]
        n = len(bench.of_kind("ground"))
        assert (own["low"], own["high"]) == wilson(own["value"], n)
        assert (together["low"], together["high"]) == wilson(together["value"], n)
        assert "as wide as those of one prompt a class" in tables(report)[1].note


class TestNewEntity:
    def test_nothing_of_it_is_found_before_it_is_added_and_it_is_after(
        self, bench, model, settings, drawn, tmp_path, emoji_kb
    ):
        before = len(emoji_kb)
        models = new_entity_models(bench, model, tmp_path / "copies")
        assert models.added() == {}
        report = run_sweep(bench, model, "new-entity", settings, models=models)
        assert report.by_kind["before"]["ground"]["found"]["value"] == 0.0
        assert report.by_kind["after"]["ground"]["found"]["value"] == 1.0
        assert report.by_kind["before"]["two"]["found"]["value"] == 0.0
        after = plan_points("new-entity", settings)[1]
        rows = bench.neighbors(models.model_of(after), after, bench.of_kind("two"))
        for prompt, row in zip(bench.of_kind("two"), rows, strict=True):
            assert {each.class_id for each in row} & set(prompt.class_ids)
        assert report.to_json()["added"] == models.added()
        assert models.added()["seconds_to_add"] > 0
        assert len(emoji_kb) == before

    def test_how_long_adding_took_is_kept_and_other_entities_are_another_knowledge_base(
        self, bench, model, settings, drawn, tmp_path
    ):
        def go(some, name):
            models = new_entity_models(some, model, tmp_path / name)
            return run_sweep(some, model, "new-entity", settings, out=tmp_path / "out", models=models)

        first = go(bench, "first")
        drawn.clear()
        again = go(bench, "again")
        assert not drawn
        assert again.to_json() == first.to_json()
        assert again.to_json()["added"]["seconds_to_add"] > 0
        write_sweep(again, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "new-entity.json").read_text())["added"] == first.facts["added"]
        grounds = KindsBench(bench.of_kind("ground"), bench.glyphs, bench.recognizer, size=SIZE)
        go(grounds, "grounds")
        assert len(drawn) == 2
        assert "added" not in run_sweep(bench, model, "arms", settings).to_json()

    def test_it_needs_a_knowledge_base_that_can_be_copied(self, bench, model_folder, tmp_path):
        with pytest.raises(QueryError, match="copy of the knowledge base"):
            new_entity_models(bench, TextToImage.load(model_folder, device="cpu"), tmp_path)


class TestCommand:
    @pytest.fixture
    def radt(self, capsys, monkeypatch, tmp_path, model_folder, emoji_kb):
        classes = sorted({entity.class_id for entity in load_entities()})
        network = RecognizerNetwork(RecognizerConfig(image_size=16, widths=(4,), feature_width=4), len(classes))
        save_recognizer(tmp_path / "recognizer", network, classes)
        monkeypatch.chdir(tmp_path)

        def call(*words, recognizer="recognizer"):
            capsys.readouterr()
            named = ("--model", str(model_folder), "--kb", str(emoji_kb.directory), "--recognizer", recognizer)
            with pytest.raises(SystemExit) as end:
                run(app, ["evaluate", "emoji-draw", *named, *words])
            out, err = capsys.readouterr()
            return end.value.code or 0, out, err

        return call

    @pytest.mark.slow  # draws every emoji
    def test_a_sweep_is_one_command_and_the_same_again_draws_nothing(self, radt, tmp_path, monkeypatch):
        words = ("-n", "1", "--steps", "1", "--kinds", "ground,two", "--sweep", "by", "--fusion", "sum")
        words = (*words, "--out", "o", "--json")
        code, out, err = radt(*words)
        assert (code, err) == (0, "")
        document = json.loads(out)
        assert [point["name"] for point in document["points"]] == ["by=clip", "by=bm25", "by=hybrid"]
        assert {"ceiling", "recognizer", "settings", "model", "kb", "kinds"} <= set(document)
        assert document["recognizer"]["judge"] == "trained"
        assert {"by.json", "by.md", "by.png", "points"} <= {path.name for path in (tmp_path / "o").iterdir()}

        def never(*_, **__):
            raise AssertionError("drawn again")

        monkeypatch.setattr(TextToImage, "draw_many", never)
        assert json.loads(radt(*words)[1]) == document

    @pytest.mark.slow  # draws every emoji
    def test_people_get_tables(self, radt):
        code, out, _ = radt("-n", "1", "--steps", "1", "--kinds", "ground")
        assert code == 0
        for word in ("with retrieval", "entity top-1", "true scenes"):
            assert word in out

    @pytest.mark.slow  # draws every emoji
    def test_the_short_form_is_judged_by_the_trained_one(self, radt):
        code, out, _ = radt("-n", "1", "--steps", "1", "--json")
        document = json.loads(out)
        assert code == 0
        assert document["recognizer"]["judge"] == "trained"
        assert document["recognizer"]["classes"] == len({entity.class_id for entity in load_entities()})
        assert document["recognizer_ceiling"]["entity_top1_by_pixels"] == 1.0

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--kinds", "three"), "unknown kind 'three'"),
            (("--sweep", "k", "--new-entity"), "two measurements"),
            (("-k", "0", "--kinds", "all"), "k must be at least 1"),
            (("--sweep", "k", "-k", "2"), "--sweep k draws with one k after the other"),
            (("--sweep", "text-share", "--text-share", "0.3"), "--sweep text-share draws with one text_share after"),
            (("--sweep", "by", "--by", "clip"), "--sweep by draws with one by after the other"),
        ],
    )
    def test_what_cannot_be_measured_is_one_sentence(self, radt, words, said):
        code, out, err = radt(*words)
        assert (code, out) == (1, "")
        (line,) = err.strip().splitlines()
        assert said in line

    @pytest.mark.parametrize("words", [("--kinds", "ground"), ()])
    def test_a_recogniser_that_lacks_a_class_is_one_sentence_before_the_drawing(self, radt, words, tmp_path, drawn):
        network = RecognizerNetwork(RecognizerConfig(image_size=16, widths=(4,), feature_width=4), 2)
        save_recognizer(tmp_path / "small", network, [1, 2])
        code, out, err = radt("-n", "3", *words, recognizer="small")
        assert (code, out, drawn) == (1, "", [])
        (line,) = err.strip().splitlines()
        assert "knows 2 classes, and 3 of those asked for are not among them" in line

    def test_without_matplotlib_the_extra_is_named_before_the_work(self, radt, monkeypatch, drawn):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        code, _, err = radt("--kinds", "ground", "--out", "o")
        assert (code, drawn) == (1, [])
        assert "pip install 'radt[eval]'" in err

    def test_a_recogniser_that_is_not_there_is_one_sentence(self, radt):
        code, _, err = radt("--kinds", "all", recognizer="nowhere")
        assert code == 1
        assert "radt train recognizer-emoji" in err


def test_a_knowledge_base_of_something_else_is_refused(bench, tiny_bundle, tiny_kb):
    model = TextToImage.load(tiny_bundle, kb=tiny_kb, device="cpu")
    with pytest.raises(KnowledgeBaseError, match="finds no emoji"):
        bench.neighbors(model, plan_points("by", model.settings())[0], bench.of_kind("ground"))


def without(document, names):
    """The document with the given keys left out at every depth."""
    if isinstance(document, list):
        return [without(each, names) for each in document]
    if not isinstance(document, dict):
        return document
    return {key: without(value, names) for key, value in document.items() if key not in names}
