import json

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
from radt.evaluation import emoji_draw_sheet
from radt.evaluation.emoji_draw import EmojiDrawBench, evaluate, plan_tasks
from radt.evaluation.emoji_draw_sheet import write_results
from radt.evaluation.plain_results import JUDGES
from radt.evaluation.report import write_report
from radt.evaluation.results import Result
from radt.neighbors import Reference
from radt.pipeline import DrawRequest, TextToImage
from tests.integration.conftest import copy_bundle, save_tiny_bundle

N, SIZE = 3, 16
PARTS = {"n", "retrieval", "recognizer", "recognizer_ceiling", "intervals", "settings", "model", "kb"}
ARMS = {"with_retrieval", "without_retrieval", "with_one_wrong"}
SHARES = {
    "entity_top1",
    "entity_top5",
    "entity_top1_by_pixels",
    "entity_top5_by_pixels",
    "ground_color",
    "right_neighbor",
    "drew_wrong_neighbor",
}


@pytest.fixture(scope="module")
def glyphs():
    return GlyphRenderer()


@pytest.fixture(scope="module")
def model_folder(tiny_clip, tmp_path_factory):
    return save_tiny_bundle(tmp_path_factory.mktemp("bundles") / "sixteen", tiny_clip, image_size=SIZE)


@pytest.fixture(scope="module")
def emoji_kb(model_folder, glyphs, tmp_path_factory):
    """Two pictures of each of a few entities, those of the first tasks among them."""
    tasks = plan_tasks(load_entities(), n=N, seed=0)
    kb = KnowledgeBase.create(tmp_path_factory.mktemp("bases") / "emoji", ClipEmbedder.load(str(model_folder)))
    for entity in [*(task.entity for task in tasks), *load_entities()[:4]]:
        pictures = [render_rendition(glyphs.glyph(entity), rendition(entity, number), 32) for number in (0, 1)]
        kb.add([Image.fromarray(picture) for picture in pictures], entity.caption, metadata=entity.facts())
    kb.build_search("exact", duplicates=False)  # an untrained model finds all pictures alike
    return kb


@pytest.fixture(scope="module")
def model(model_folder, emoji_kb):
    return TextToImage.load(model_folder, kb=emoji_kb, device="cpu")


@pytest.fixture(scope="module")
def bench(glyphs):
    return make_bench(glyphs, N)


def make_bench(glyphs, n):
    """The real tasks, judged among fewer candidates."""
    tasks = plan_tasks(load_entities(), n=n, seed=0)
    candidates = {entity.position: entity for entity in [*load_entities()[::20], *(task.entity for task in tasks)]}
    return EmojiDrawBench(tasks, glyphs, list(candidates.values()), size=SIZE, seed=0)


@pytest.fixture(scope="module")
def report(model, bench):
    return bench.run(model, settings=model.settings(by="bm25", sampler="ancestral", order="coin"))


@pytest.fixture
def radt(capsys, monkeypatch, tmp_path, model_folder, emoji_kb):
    """Run the command in an empty folder. (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(app, ["evaluate", "emoji-draw", "--model", str(model_folder), *words])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def test_many_prompts_in_one_call_are_the_pictures_drawn_alone(model):
    neighbors = model.retrieve("apple", settings=model.settings(k=2))
    asked = [
        DrawRequest(prompt="an apple on a red background", neighbors=neighbors, seed=3),
        DrawRequest(prompt="nothing found", seed=3),
        DrawRequest(prompt="one found", neighbors=neighbors[:1], seed=4),
        DrawRequest(prompt="an apple on a red background", neighbors=neighbors, seed=5),
    ]
    settings = model.settings(sampler="ancestral", order="coin")
    alone = [model.draw(each.prompt, each.neighbors, settings=settings, seeds=[each.seed])[0] for each in asked]
    one_by_one = list(model.draw_many(asked, settings=settings))
    steps = []
    batched = model.draw_many(
        asked,
        settings=model.settings(sampler="ancestral", order="coin", batch_size=3),
        on_step=lambda *at: steps.append(at),
    )
    for a, b, c in zip(alone, one_by_one, batched, strict=True):
        assert np.array_equal(a, b)
        assert np.abs(a.numpy().astype(int) - c.numpy()).max() <= 1
    assert steps[-1] == (4 * settings.steps, 4 * settings.steps)
    assert steps == sorted(steps)


def test_the_arms_are_what_generate_draws_end_to_end(model, report):
    settings = {"by": "bm25", "sampler": "ancestral", "order": "coin"}
    for place, task in enumerate(report.tasks):
        drawn = {name: arm.drawings[place] for name, arm in report.arms.items()}
        (found,) = model(task.prompt, seed=task.seed, **settings)
        (alone,) = model(task.prompt, seed=task.seed, k=0, **settings)
        given = [
            Reference(image=each.neighbor.original, caption=each.neighbor.caption)
            for each in drawn["with_one_wrong"].shown
        ]
        (misled,) = model(task.prompt, seed=task.seed, references=given, **settings)
        assert np.array_equal(drawn["with_retrieval"].picture, found.image)
        assert drawn["with_retrieval"].copy_similarity == found.record.copy_similarity
        assert np.array_equal(drawn["without_retrieval"].picture, alone.image)
        assert np.array_equal(drawn["with_one_wrong"].picture, misled.image)


def test_neighbours_are_judged_by_the_corpus_records(report):
    for task, drawing in zip(report.tasks, report.arms["with_retrieval"].drawings, strict=True):
        for shown in drawing.shown:
            assert (shown.class_id == task.entity.class_id) == (shown.neighbor.caption == task.entity.caption)
    assert report.retrieval_shares()["recall_at_k"] == 1.0
    assert report.shares("without_retrieval")["right_neighbor"] == 0.0


def test_a_model_is_measured_with_the_search_of_its_own(model_folder, emoji_kb, bench, tmp_path):
    folder = copy_bundle(model_folder, tmp_path / "phrases", by="bm25", decompose="phrases")
    model = TextToImage.load(folder, kb=emoji_kb, device="cpu")
    for asked in ("phrases", "off"):
        report = bench.run(model, settings=None if asked == "phrases" else model.settings(decompose=asked))
        assert report.to_json()["settings"]["decompose"] == asked
        parts = [shown.neighbor.part for drawing in report.arms["with_retrieval"].drawings for shown in drawing.shown]
        assert all((part is not None) == (asked == "phrases") for part in parts)


def test_true_pictures_score_in_every_arm(model, bench, monkeypatch):
    monkeypatch.setattr(TextToImage, "draw_many", lambda *_, **__: map(torch.from_numpy, bench.truths))
    document = bench.run(model).to_json()
    for name in ARMS:
        assert [document[name][share] for share in ("entity_top1", "entity_top5", "ground_color")] == [1.0, 1.0, 1.0]
        assert document["intervals"][name]["entity_top1"] == pytest.approx([0.4385, 1.0], abs=5e-5)


def test_a_pasted_neighbour_is_a_copy_and_not_a_drawing(model, bench, monkeypatch):
    def paste(_, requests, **__):
        for request, truth in zip(requests, bench.truths, strict=True):
            yield request.neighbors[0].pixels if request.neighbors else torch.from_numpy(truth)

    monkeypatch.setattr(TextToImage, "draw_many", paste)
    document = bench.run(model, settings=model.settings(by="bm25")).to_json()
    assert document["with_retrieval"]["copy_similarity"] == pytest.approx(1.0)
    assert document["with_retrieval"]["ground_color"] < 0.5
    assert document["without_retrieval"]["entity_top1"] == 1.0


def test_the_same_seed_gives_the_same_report(model, bench, report):
    again = bench.run(model, settings=report.settings)
    timed = ("seconds_per_image", "seconds_per_query")
    assert without(again.to_json(), timed) == without(report.to_json(), timed)


@pytest.mark.slow  # draws every emoji
def test_the_document_has_the_promised_keys_and_is_on_disk_too(radt, emoji_kb, tmp_path):
    code, out, err = radt(
        "--kb", str(emoji_kb.directory), "--n", "3", "--steps", "2", "--by", "bm25", "--out", "o", "--json"
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert ARMS | {"n", "retrieval", "recognizer", "recognizer_ceiling", "intervals", "settings", "model", "kb"} == set(
        document
    )
    assert document["n"] == N
    for name in ARMS:
        assert set(document[name]) == SHARES | {"copy_similarity", "seconds_per_image"}
        assert set(document["intervals"][name]) == SHARES
    assert {"recall_at_k", "precision_at_k", "all_right"} <= set(document["retrieval"])
    assert document["without_retrieval"]["copy_similarity"] is None
    assert document["settings"]["steps"] == 2
    assert document["settings"]["seed"] == 0
    assert json.loads((tmp_path / "o" / "results.json").read_text()) == document
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "emoji-draw.result.json",
        "results.json",
        "sheet_01.html",
        "sheet_01.png",
    ]
    page = (tmp_path / "o" / "sheet_01.html").read_text()
    assert all(task.prompt in page for task in plan_tasks(load_entities(), n=N, seed=0))


@pytest.mark.slow  # draws every emoji
def test_people_get_a_table(radt, emoji_kb):
    words = ("--kb", str(emoji_kb.directory), "-n", "1", "--steps", "1", "--decompose", "phrases", "--out", "o")
    code, out, _ = radt(*words)
    assert code == 0
    assert out.splitlines()[-1] == "o/results.json"
    for word in ("with retrieval", "entity top-1", "ground colour", "by hybrid, decompose phrases", "recall"):
        assert word in out


@pytest.mark.slow  # draws every emoji
def test_an_interrupted_run_leaves_nothing(radt, emoji_kb, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImage, "draw_many", interrupt)
    code, out, _ = radt("--kb", str(emoji_kb.directory), "-n", "1", "--out", "o")
    assert (code, out) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_run_leaves_no_sheets_of_a_larger_one(report, model, glyphs, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_draw_sheet, "ROWS_A_SHEET", 2)
    assert len(write_results(report, tmp_path)) == 6
    small = make_bench(glyphs, 1)
    write_results(small.run(model, settings=model.settings(by="bm25", steps=1)), tmp_path)
    names = ["emoji-draw.result.json", "results.json", "sheet_01.html", "sheet_01.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "results.json").read_text())["n"] == 1


def test_the_report_shows_the_command_that_was_typed_and_the_judge(report, tmp_path, monkeypatch):
    typed = ["radt", "evaluate", "emoji-draw", "--kb", "my kb", "--by", "bm25", "--steps", "1", "--out", "o"]
    monkeypatch.setattr("sys.argv", typed)
    write_results(report, tmp_path)
    stored = Result.load(tmp_path / "emoji-draw.result.json")
    assert stored.command == "radt evaluate emoji-draw --kb 'my kb' --by bm25 --steps 1 --out o"
    assert stored.facts["judge"] == JUDGES[report.judge["judge"]]
    assert stored.data == json.loads((tmp_path / "results.json").read_text())
    assert [(tmp_path / picture.file).is_file() for picture in stored.pictures] == [True]
    page, _ = write_report([tmp_path], tmp_path / "page")
    assert page.read_text().count("<h2") == 1  # not once more from results.json
    assert "--by bm25 --steps 1" in page.read_text()
    assert stored.facts["judge"] in page.read_text()


def test_without_a_knowledge_base_one_sentence_says_how_to_make_one(radt):
    code, out, err = radt("--json")
    assert (code, out) == (1, "")
    (line,) = err.strip().splitlines()
    assert "--kb" in line
    assert "radt corpus emoji" in line


def test_what_cannot_be_measured_is_refused(model, bench, tiny_bundle, tiny_kb):
    with pytest.raises(QueryError, match="k must be at least 1, got 0"):
        evaluate(model, settings=model.settings(k=0))
    other = TextToImage(model.bundle, kb=TextToImage.load(tiny_bundle, kb=tiny_kb, device="cpu").kb)
    with pytest.raises(KnowledgeBaseError, match="finds no emoji"):
        bench.run(other)


def without(document, names):
    """The document with the given keys left out at every depth."""
    if not isinstance(document, dict):
        return document
    return {key: without(value, names) for key, value in document.items() if key not in names}
