import dataclasses
import errno
import json
import os

import pytest
from PIL import Image

from index.cli import run
from radt import generate as library
from radt.cli import FILTERS, SETTINGS, app
from radt.settings import GenerateSettings
from tests.fakes import draw, encode

PROMPT = "a red circle"


@pytest.fixture
def radt(capsys, monkeypatch, tmp_path, tiny_bundle, phrases_bundle, tiny_kb):
    """Run a command line in an empty folder. (exit code, stdout, stderr).

    MODEL and KB stand for the tiny ones, PHRASES for the model that looks up every thing that a prompt names.
    """
    monkeypatch.chdir(tmp_path)

    def call(*words):
        folders = {"MODEL": str(tiny_bundle), "PHRASES": str(phrases_bundle), "KB": str(tiny_kb)}
        named = [folders.get(word, word) for word in words]
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(app, named)
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def one_sentence(err: str) -> str:
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_generate_prints_one_document_with_the_promised_keys(radt):
    code, out, err = radt("generate", PROMPT, "two", "--model", "MODEL", "--kb", "KB", "-n", "2", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert set(document) == {"images", "refused", "timings_ms", "neighbor_store"}
    assert set(document["timings_ms"]) == {"retrieve", "encode_neighbors", "sample"}
    assert [(image["prompt"], image["seed"]) for image in document["images"]] == [
        (prompt, seed) for prompt in (PROMPT, "two") for seed in (0, 1)
    ]
    first = document["images"][0]
    assert {"path", "seed", "prompt", "neighbors", "copy_similarity"} <= set(first)
    assert {"id", "caption", "score", "attention"} <= set(first["neighbors"][0])
    assert first["neighbors"][0]["id"].isdigit()
    with Image.open(first["path"]) as image:
        assert image.size == (8, 8)


def test_generate_explains_and_draws_a_sheet(radt, tmp_path):
    code, out, _ = radt("generate", PROMPT, "--model", "MODEL", "--kb", "KB", "--explain", "--sheet", "sheet.png")
    assert code == 0
    assert "number" in out
    assert out.splitlines()[-1] == "out/00000_a-red-circle_seed0.png"
    assert (tmp_path / "sheet.png").exists()
    assert PROMPT in (tmp_path / "sheet.html").read_text()


def test_generate_says_what_each_neighbour_was_found_for(radt, tmp_path):
    words = ("generate", "a red circle, a blue square", "--model", "PHRASES", "--kb", "KB")
    _, out, _ = radt(*words, "--explain", "--sheet", "sheet.png")
    assert ["for a red circle" in out, "for a blue square" in out] == [True, True]
    assert "  bm25 " not in out  # a search by words alone has one score, and says it once
    page = (tmp_path / "sheet.html").read_text()
    assert "<span>for a blue square</span>" in page
    assert "found by bm25, decompose phrases" in page
    _, out, _ = radt(*words, "--decompose", "off", "--explain")
    assert "  for a" not in out


@pytest.mark.parametrize(("typed", "used"), [((), "phrases"), (("--decompose", "off"), "off")])
def test_what_is_typed_overrides_the_models_own(radt, typed, used):
    _, out, _ = radt("generate", PROMPT, "--model", "PHRASES", "--kb", "KB", *typed, "--json")
    (image,) = json.loads(out)["images"]
    assert image["settings"]["decompose"] == used
    assert {neighbor["part"] for neighbor in image["neighbors"]} == {PROMPT if used == "phrases" else None}


def test_every_setting_of_a_picture_is_an_option_and_only_what_is_typed_is_asked_for(radt, monkeypatch):
    decided_by_others = {"encode_apart"}  # --neighbor-store
    fields = {field.name for field in dataclasses.fields(GenerateSettings)}
    assert SETTINGS.keys() | FILTERS.keys() == fields - decided_by_others
    asked = []
    monkeypatch.setattr(library, "generate_files", lambda request, **_: asked.append(request.settings) or [])
    radt("generate", PROMPT)
    words = {"k": "3", "text_share": "0.25", "order": "coin", "decompose": "off", "where": "id = 7", "exclude": "7"}
    radt("generate", PROMPT, *(part for name, word in words.items() for part in (option(name), word)))
    assert asked == [{}, {**words, "k": 3, "text_share": 0.25, "exclude": ["7"]}]


def option(name: str) -> str:
    return "-k" if name == "k" else f"--{name.replace('_', '-')}"


def test_generate_takes_references_without_a_knowledge_base(radt, tmp_path):
    (tmp_path / "dog.png").write_bytes(encode(draw(3)))
    words = ("generate", PROMPT, "--model", "MODEL", "--reference", "dog.png=a dog", "--reference", "dog.png=a hound")
    _, out, _ = radt(*words, "--json")
    neighbors = json.loads(out)["images"][0]["neighbors"]
    assert [(neighbor["id"], neighbor["caption"]) for neighbor in neighbors] == [
        ("reference:dog.png", "a dog"),
        ("reference:dog.png", "a hound"),
    ]
    assert json.loads(out)["images"][0]["copy_similarity"] >= 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere"], "model folder 'nowhere' does not exist"),
        (["--model", "MODEL", "--kb", "nowhere"], "nowhere is not a knowledge base"),
        (["--model", "MODEL", "--sampler", "magic"], "sampler 'magic' is unknown"),
        (["--model", "MODEL", "-k", "4"], "k would have no effect without a knowledge base"),
        (["--model", "MODEL", "--by", "clip", "--min-score", "1"], "by, min_score would have no effect"),
        (["--model", "MODEL", "--kb", "KB", "-k", "-3"], "k is the number of neighbours"),
        (["--model", "MODEL", "--kb", "KB", "--unconditional"], "unconditional draws from no knowledge base"),
        (["--model", "MODEL", "--prompts", "p.jsonl"], "line 2 of 'p.jsonl': k, by would have no effect without"),
        (["--model", "MODEL", "--reference", "no.png=x"], "no image file at 'no.png'"),
        (["--model", "MODEL", "--reference", "broken.png=x"], "broken.png cannot be read as an image"),
        (["--model", "MODEL", "--text-share", "2"], "text_share must lie"),
        (["--model", "MODEL", "--out", "broken.png"], "could not write"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_1(radt, tmp_path, words, said):
    (tmp_path / "broken.png").write_bytes(encode(draw(1))[:50])
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "k": 1, "by": "clip"}')
    code, out, err = radt("generate", PROMPT, *words, "--json")
    assert code == 1
    assert out == ""
    assert said in one_sentence(err)


@pytest.mark.parametrize("words", [["generate"], ["generate", "x", "--steps", "many"], ["nonsense"], ["train", "tiny"]])
def test_wrong_usage_is_exit_2(radt, words):
    assert radt(*words)[0] == 2


def test_a_full_disk_is_one_sentence_and_leaves_nothing(radt, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = radt("generate", PROMPT, "--model", "MODEL", "--json")
    assert code == 1
    assert "No space left" in one_sentence(err)
    assert list((tmp_path / "out").iterdir()) == []


def test_debug_shows_the_traceback_instead(radt, monkeypatch):
    from index.errors import UserError

    with pytest.raises(UserError):
        run(app, ["generate", PROMPT, "--model", "nowhere", "--debug"])


def test_an_interrupt_is_one_sentence_and_exit_130(radt, monkeypatch):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "generate_files", interrupted)
    code, _, err = radt("generate", PROMPT, "--model", "MODEL")
    assert code == 130
    assert "stopped" in one_sentence(err)


def test_replay_of_what_was_generated_is_identical(radt, tmp_path):
    radt("generate", PROMPT, "--model", "MODEL", "--kb", "KB", "--out", "o")
    code, out, _ = radt("replay", "o/00000_a-red-circle_seed0.png", "--model", "MODEL", "--json")
    assert code == 0
    assert json.loads(out) == {"identical": True, "max_difference": 0.0, "note": None}


def test_replay_of_a_changed_picture_exits_1(radt, tmp_path):
    radt("generate", PROMPT, "--model", "MODEL", "--out", "o")
    path = tmp_path / "o" / "00000_a-red-circle_seed0.png"
    from radt.provenance import read_png, save_png

    image, record = read_png(path)
    image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    save_png(path, image, record)
    code, out, _ = radt("replay", str(path), "--model", "MODEL", "--json")
    assert code == 1
    assert json.loads(out)["identical"] is False
    assert json.loads(out)["max_difference"] > 0


def test_replay_of_a_foreign_picture_is_one_sentence(radt, tmp_path):
    draw(1).save(tmp_path / "foreign.png")
    code, _, err = radt("replay", "foreign.png", "--model", "MODEL")
    assert code == 1
    assert "carries no record" in one_sentence(err)


def test_doctor_reports_in_words_and_in_json(radt):
    code, out, _ = radt("doctor", "--model", "MODEL", "--json")
    document = json.loads(out)
    assert document["healthy"] is (code == 0)
    assert {finding["name"]: finding["state"] for finding in document["findings"]}["model"] == "ok"
    assert "python" in radt("doctor", "--model", "MODEL")[1]


def test_scenes_are_written_and_counted(radt, tmp_path):
    words = ("corpus", "emoji-scenes", "scenes", "--num", "3", "--size", "16", "--json")
    code, out, _ = radt(*words)
    assert code == 0
    assert json.loads(out) == {"out": "scenes", "pairs": 3, "shards": 1, "shards_kept": 0}
    assert json.loads(radt(*words)[1])["shards_kept"] == 1


def test_an_unknown_preset_is_one_sentence(radt):
    code, _, err = radt("train", "nonsense", "--out", "run")
    assert code == 1
    assert "unknown preset 'nonsense'" in one_sentence(err)


def test_the_index_commands_are_mounted_with_the_models_encoder(radt, tiny_kb):
    code, out, _ = radt("index", "query", PROMPT, "--kb", "KB", "-k", "2", "--json")
    assert code == 0
    assert len(json.loads(out)["hits"]) == 2
