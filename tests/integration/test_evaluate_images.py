"""`radt evaluate images` and `retrieval` as a user meets them: what they print, keep, take up again, and refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.cli import run
from index.errors import ConfigError, CorpusError, ModelError, QueryError
from radt.cli import app
from radt.copying import copy_similarity
from radt.evaluation import image_measures, image_set
from radt.evaluation.extractors import Extracted, load_extractor
from radt.evaluation.image_measures import (
    COPY_CANDIDATES,
    MEASURES,
    NotMeasurableError,
    Options,
    asked_class,
    real_similarities,
)
from radt.evaluation.image_set import PictureFile, find_pictures, measure_set
from radt.evaluation.images import measure_images
from radt.evaluation.results import Result
from radt.neighbors import Neighbor, to_rgb8
from tests.fakes import caption_of, draw, encode, sample, write_img2dataset, write_tar

N = 14
SEARCHED_WITH = "not independent: the model looked its prompts up with this very encoder"
READ_BY = "not independent: the model reads its prompts with this very encoder"


@pytest.fixture
def radt(capsys):
    """Run a command of `radt evaluate`. (exit code, stdout, stderr)."""

    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(app, ["evaluate", *map(str, words)])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.fixture
def error(radt):
    """The one sentence that a command ends with."""

    def call(*words):
        code, out, err = radt(*words)
        assert (code, out) == (1, ""), (code, out, err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return call


def write_pictures(folder, numbers, *, captions=True):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:03d}.png").write_bytes(encode(draw(number)))
        if captions:
            (folder / f"{number:03d}.txt").write_text(caption_of(number))
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", range(N))


@pytest.fixture
def reals(tmp_path):
    return write_pictures(tmp_path / "reals", range(N - 4, 2 * N), captions=False)


@pytest.fixture
def clip(tiny_clip):
    return f"open_clip:{tiny_clip}"


class Counting:
    """An extractor of means of colour, as a test wants them; counts what it is asked for, and may stop."""

    name, kind, side, resize, width, digest = "counting", "timm", 1, "mean colour", 3, "c0ffee" * 5
    class_words: dict[str, int] = {}  # noqa: RUF012 - as the protocol has it
    class_numbers: dict[int, int] = {}  # noqa: RUF012

    def __init__(self, *, stop_after: int | None = None, broken: bool = False):
        self.count, self.stop_after, self.broken = 0, stop_after, broken

    def extract(self, images):
        if self.stop_after is not None and self.count >= self.stop_after:
            raise KeyboardInterrupt
        self.count += len(images)
        means = np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) / 255 for image in images])
        return Extracted(features=np.where(np.arange(3) == 1, np.nan, means) if self.broken else means)


# The command


def test_every_measure_that_can_be_taken_is_printed_with_what_it_rests_on(radt, pictures, reals, clip, tmp_path):
    out = tmp_path / "out"
    words = ["images", pictures, "--real", reals, "--extractor", clip, "--extractor", "timm:test_vit:untrained"]
    code, text, err = radt(*words, "--out", out, "--subsets", 5)
    assert (code, err) == (0, "")
    digests = {name: load_extractor(name).digest for name in (clip, "timm:test_vit:untrained")}
    for part in ("FD [1]", "KD", "MMD", "precision", "coverage", "CLIP score", f"R-precision of {N}", *MEASURES[:1]):
        assert part.lower() in text.lower()
    assert "FID" not in text  # it is called so over Inception alone
    assert "KID or CMMD" in text
    assert "N too small: 14 pictures for 16 features" in text
    assert "the model's own: Resize 32 bicubic" in text
    assert all(digest[:8] in text for digest in digests.values())
    document = json.loads((out / "results.json").read_text())
    assert {score["measure"] for score in document["scores"]} == set(MEASURES)
    page = (out / "results.md").read_text()
    assert "`label` in --captions" in page
    for score in document["scores"]:
        low, high = score["interval"]
        assert low <= score["value"] <= high
        assert score["n"] == (N if score["measure"] != "soa" else 1)  # "a orange circle" names an ImageNet class
        assert score["extractor_digest"] == digests[score["extractor"]]
        assert score["resize"]
        assert (score["n_real"] == N + 4) == ("real" in score["title"] or score["measure"] in MEASURES[:7])
    assert "|---|---:|---:|---:|---:|---:|" in page
    assert "![" in page
    plot = Image.open(out / "plot.png")
    assert plot.width > 500
    assert len(set(plot.convert("L").tobytes())) > 10
    stored = Result.load(out / "images.result.json")
    (table,) = stored.tables
    assert len(table.rows) == len(document["scores"])
    marks = [set(re.findall(r"\[\d+\]", row[0])) for row in table.rows]
    assert [len(each) for each in marks] == [len(score["notes"]) for score in document["scores"]]
    assert all(mark in table.note for mark in set.union(*marks))  # each leads to a note below
    assert marks[0] == {"[1]"}


def test_json_is_one_document_and_nothing_else(radt, pictures, clip):
    code, out, _ = radt("images", pictures, "--extractor", clip, "--metrics", "clip-score,r-precision", "--json")
    assert code == 0
    document = json.loads(out)
    assert out.count("\n") == 1
    assert [score["measure"] for score in document["scores"]] == ["clip-score", "r-precision"]
    assert "easier than among 100" in document["scores"][1]["notes"][0]


def test_the_reals_may_be_a_knowledge_base_or_a_corpus(radt, pictures, clip, tiny_kb, tmp_path):
    write_img2dataset(tmp_path / "corpus")
    for real in (tiny_kb, tmp_path / "corpus"):
        code, out, err = radt("images", pictures, "--real", real, "--extractor", clip, "--metrics", "cmmd", "--json")
        assert code == 0, err
        (score,) = json.loads(out)["scores"]
        assert score["n_real"] == 12
    lots = [[each.name for each in find_pictures(str(tiny_kb), limit=5, seed=seed)] for seed in (1, 1, 2)]
    assert len(set(lots[0])) == 5
    assert lots[0] == lots[1] != lots[2]


@pytest.mark.parametrize("source", ["tars", "tars/0.tar", "file://{}/folder"])
def test_the_reals_need_no_captions(radt, pictures, clip, tmp_path, source):
    write_tar(tmp_path / "tars" / "0.tar", {f"{i}.png": encode(draw(i)) for i in range(N)})
    write_pictures(tmp_path / "folder", range(N), captions=False)
    real = source.format(tmp_path) if ":" in source else tmp_path / source
    code, out, err = radt("images", pictures, "--real", real, "--extractor", clip, "--metrics", "cmmd", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["n_real"], document["left_out_real"]) == (N, [])
    assert sorted(each.read() for each in find_pictures(str(real))) == sorted(encode(draw(i)) for i in range(N))


def test_samples_and_shards_that_a_build_would_pass_over_are_named_left_out_and_counted(radt, pictures, clip, tmp_path):
    mixed = [*sample(0, key="a").items(), *sample(1, key="a").items(), ("b.txt", b"nothing to see")]
    mixed += [("c.png", b"no picture"), ("c.txt", b"a wolf"), (os.fsdecode(b"\xe4.png"), encode(draw(2)))]
    write_tar(tmp_path / "tars" / "0.tar", mixed)
    (tmp_path / "tars" / "1.tar").write_bytes((tmp_path / "tars" / "0.tar").read_bytes()[:3000])
    words = ["images", pictures, "--real", tmp_path / "tars", "--extractor", clip, "--metrics", "cmmd"]
    code, out, err = radt(*words, "--json")
    assert code == 0, err
    document = json.loads(out)
    reasons = {each["name"]: each["reason"] for each in document["left_out_real"]}
    assert document["n_real"] == 1
    assert {name: reasons[name] for name in ("0.tar/a", "0.tar/b", r"0.tar/\udce4")} == {
        "0.tar/a": "duplicate key",
        "0.tar/b": "no image",
        r"0.tar/\udce4": "the file name is not UTF-8",
    }
    assert "it is cut short" in reasons["1.tar"]
    assert len(reasons) == len(document["left_out_real"]) == 5
    assert "left out, 5 of the reals: 0.tar/a (duplicate key)" in radt(*words)[1]


def test_pictures_of_generate_say_themselves_what_they_should_show(capsys, radt, tiny_bundle, tiny_kb, tmp_path):
    from index.embedder import ClipEmbedder

    words = ["a red circle", "a green square", "--kb", tiny_kb, "--model", tiny_bundle, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit):
        run(app, ["generate", *map(str, words)])
    found = find_pictures(str(tmp_path / "out"))
    assert [picture.caption for picture in found] == ["a red circle", "a green square"]
    assert {picture.encoder for picture in found} == {ClipEmbedder.load(str(tiny_bundle)).fingerprint}
    code, out, err = radt("images", tmp_path / "out", "--extractor", f"open_clip:{tiny_bundle}", "--json")
    assert code == 0, err
    scores = {score["measure"]: score for score in json.loads(out)["scores"]}
    assert set(scores) == {"clip-score", "r-precision", "copies"}
    assert [note for note in scores["clip-score"]["notes"] if "not independent" in note] == [SEARCHED_WITH, READ_BY]
    recorded = np.mean([picture.copy_similarity > 0.95 for picture in found])
    assert scores["copies"]["value"] == recorded


@pytest.mark.parametrize("words", [("--by", "bm25"), ("--by", "tfidf"), ("-k", "0")])
def test_an_encoder_is_not_blamed_for_a_search_that_it_had_no_part_in(
    capsys, tiny_bundle, tiny_kb, other_clip, tmp_path, words
):
    said = ["a red circle", "--kb", tiny_kb, "--model", tiny_bundle, "--out", tmp_path / "out", *words]
    with pytest.raises(SystemExit) as end:
        run(app, ["generate", *map(str, said)])
    assert not end.value.code, capsys.readouterr().err

    def notes(name):
        extractor, found = load_extractor(f"open_clip:{name}"), find_pictures(str(tmp_path / "out"))
        assert found[0].encoder is None
        return measure_images(found, [extractor], options=Options(measures=("clip-score",))).rows[0].notes

    assert notes(tiny_bundle) == (READ_BY,)
    assert notes(other_clip) == ()


def test_captions_and_labels_of_a_file_go_before_others(radt, pictures, clip, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("file,caption,label\n000.png,a wolf,7\n001,a cat,\n")
    found = find_pictures(str(pictures), captions=table)
    assert [(each.caption, each.label) for each in found[:3]] == [
        ("a wolf", "7"),
        ("a cat", None),
        (caption_of(2), None),
    ]
    lines = tmp_path / "captions.jsonl"
    lines.write_text('{"file": "002.png", "prompt": "a dog", "label": 3}\n')
    assert find_pictures(str(pictures), captions=lines)[2].label == "3"
    code, out, err = radt(
        "images", pictures, "--extractor", "timm:test_vit:untrained", "--captions", table, "--metrics", "soa", "--json"
    )
    assert code == 0, err
    by_picture, by_class = json.loads(out)["scores"]
    assert (by_picture["title"], by_class["title"], by_picture["n"]) == ("SOA-I", "SOA-C", 2)
    assert "12 pictures ask for no class" in by_picture["notes"][0]


def test_the_same_seed_gives_the_same_scores(radt, pictures, reals, clip):
    words = ["images", pictures, "--real", reals, "--extractor", clip, "--json", "--subsets", 5, "--metrics", "fd,kid"]
    one, again, other = (json.loads(radt(*words, "--seed", seed)[1])["scores"] for seed in (1, 1, 2))
    assert one == again
    assert one != other


# Going on


def test_a_run_that_was_stopped_goes_on_where_it_was(monkeypatch, pictures, tmp_path):
    monkeypatch.setattr(image_set, "BATCH_ROWS", 4)
    found = find_pictures(str(pictures))
    stopped, fresh, idle = Counting(stop_after=8), Counting(), Counting()
    steps = []
    with pytest.raises(KeyboardInterrupt):
        measure_set(found, stopped, cache=tmp_path / "cache", on_step=lambda done, of: steps.append((done, of)))
    assert steps == [(4, N), (8, N)]
    resumed = measure_set(found, fresh, cache=tmp_path / "cache", on_step=lambda done, of: None)
    assert (stopped.count, fresh.count) == (8, N - 8)
    whole = measure_set(found, idle, on_step=lambda done, of: None)
    np.testing.assert_array_equal(resumed.features, whole.features)
    again = Counting()
    measure_set(found, again, cache=tmp_path / "cache", on_step=lambda done, of: None)
    assert again.count == 0
    (pictures / "000.png").write_bytes(encode(draw(99)))  # its content counts, not its name
    measure_set(find_pictures(str(pictures)), again, cache=tmp_path / "cache", on_step=lambda done, of: None)
    assert again.count == 1


def test_a_damaged_cache_is_computed_anew_and_another_extractor_has_its_own(pictures, tmp_path):
    found, cache = find_pictures(str(pictures)), tmp_path / "cache"
    one = measure_set(found, Counting(), cache=cache, on_step=lambda done, of: None)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = Counting()
    two = measure_set(found, again, cache=cache, on_step=lambda done, of: None)
    assert again.count == N
    np.testing.assert_array_equal(one.features, two.features)
    other = Counting()
    other.digest = "beef" * 8
    measure_set(found, other, cache=cache, on_step=lambda done, of: None)
    assert other.count == N


def test_what_was_kept_by_another_version_is_computed_anew(monkeypatch, pictures, tmp_path):
    found, cache = find_pictures(str(pictures)), tmp_path / "cache"
    measured = measure_set(found, Counting(), cache=cache, on_step=lambda done, of: None)
    real_similarities(measured, measured, cache)
    kept = cache / image_measures.SIMILARITIES
    document = json.loads(kept.read_text())
    wrong = dict.fromkeys(document["similarities"], 0.0)

    def found_beside(document):
        kept.write_text(json.dumps(document))
        return set(real_similarities(measured, measured, cache))

    assert found_beside({**document, "similarities": wrong}) == {0}  # they are read
    assert found_beside(wrong) == {1}  # as they were kept at first
    monkeypatch.setattr(image_measures, "COMPARING", image_measures.COMPARING + 1)
    assert found_beside({**document, "similarities": wrong}) == {1}
    monkeypatch.setattr(image_set, "DECODING", image_set.DECODING + 1)
    again = Counting()
    measure_set(found, again, cache=cache, on_step=lambda done, of: None)
    assert again.count == N


# Copies


def test_a_copy_is_found_among_the_reals_and_once(tmp_path, monkeypatch):
    pictures = write_pictures(tmp_path / "a", range(3), captions=False)
    reals = write_pictures(tmp_path / "b", [*range(40, 50), 1], captions=False)
    sets = [
        measure_set(find_pictures(str(folder)), Counting(), on_step=lambda done, of: None)
        for folder in (pictures, reals)
    ]
    found = real_similarities(sets[0], sets[1], tmp_path / "cache")
    assert found[1] == 1
    brute = [
        max(_similarity(draw(i), draw(j)) for j in [*range(40, 50), 1]) for i in range(3)
    ]  # all reals, not the nearest few
    assert (found <= np.array(brute) + 1e-9).all()
    monkeypatch.setattr("radt.evaluation.image_measures.best_match", None)  # all of them are known by now
    np.testing.assert_array_equal(real_similarities(sets[0], sets[1], tmp_path / "cache"), found)
    assert COPY_CANDIDATES < 11


def _similarity(picture, real):
    size = (picture.height, picture.width)
    neighbor = Neighbor(id="0", caption="", pixels=to_rgb8(real, size))
    return copy_similarity(to_rgb8(picture, size), [neighbor])


# Classes in captions


def test_the_first_and_longest_class_that_a_caption_names_as_whole_words_is_asked_for():
    words = {"cat": 0, "polar bear": 1, "bear": 2, "o'clock": 3}

    def asked(caption, label=None):
        return asked_class(PictureFile(name="0", read=bytes, caption=caption, label=label), words, {0: 0, 1: 1, 907: 2})

    assert asked("a polar bear, drawn") == 1
    assert asked("A BEAR.") == 2
    assert asked("a cat on a polar bear") == 0
    assert asked("a catalogue of bears") is None
    assert asked("three o'clock") == 3
    assert asked(None) is None
    assert asked("a cat", "bear") == 2
    assert asked("a cat", "907") == 2  # a class's own number, not a column
    for label in ("2", "-1", "²"):
        with pytest.raises(
            NotMeasurableError, match=f"labelled '{label}', which is neither the name nor the number of"
        ):
            asked("a cat", label)


def test_a_label_of_another_extractor_costs_soa_alone(radt, error, pictures, reals, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("file,caption,label\n000.png,a wolf,wolf in red socks\n")
    words = ["images", pictures, "--real", reals, "--extractor", "timm:test_vit:untrained", "--captions", table]
    code, out, err = radt(*words, "--json", "--subsets", 2)
    assert code == 0, err
    document = json.loads(out)
    assert {"fd", "kid", "is"} <= {score["measure"] for score in document["scores"]}
    assert "'000.png' is labelled 'wolf in red socks'" in document["not_measured"]["soa"]
    assert "soa cannot be measured: '000.png' is labelled" in error(*words, "--metrics", "soa")


# What cannot be measured


def test_a_broken_picture_is_named_left_out_and_counted(radt, pictures, clip):
    (pictures / "100.png").write_bytes(encode(draw(3))[:60])
    (pictures / "101.png").write_bytes(b"no picture")
    (pictures / "102.png").write_bytes(encode(Image.new("RGB", (400, 2))))
    words = ["images", pictures, "--extractor", clip, "--metrics", "clip-score"]
    code, out, err = radt(*words)
    assert code == 0, err
    assert "left out, 3 of the pictures: 100.png (" in out
    assert "102.png (it is 400 by 2, too narrow" in out
    document = json.loads(radt(*words, "--json")[1])
    assert document["n"] == N
    assert [each["name"] for each in document["left_out"]] == ["100.png", "101.png", "102.png"]


def test_nothing_but_broken_pictures(error, tmp_path, clip):
    (tmp_path / "0.png").write_bytes(b"no picture")
    assert "none of 1 pictures can be read; the first is '0.png'" in error("images", tmp_path, "--extractor", clip)


def test_a_tar_without_one_picture_that_can_be_used(error, tmp_path, pictures, clip):
    write_tar(tmp_path / "tars" / "0.tar", {"a.txt": b"a wolf", "b.txt": b"a cat"})
    sentence = error("images", pictures, "--real", tmp_path / "tars", "--extractor", clip)
    assert "none of the 2 samples of" in sentence
    assert "is a picture that can be used: the first is '0.tar/a', no image; name a folder of the pictures" in sentence
    (tmp_path / "tars" / "0.tar").rename(tmp_path / "tars" / "0.tar.gz")
    assert "uncompress it" in error("images", pictures, "--real", tmp_path / "tars", "--extractor", clip)


def test_a_set_of_no_pictures(pictures):
    with pytest.raises(CorpusError, match="there are no pictures to measure"):
        measure_set([], Counting(), on_step=lambda done, of: None)
    with pytest.raises(CorpusError, match="there are no pictures to measure"):
        measure_images(find_pictures(str(pictures)), [Counting()], reals=[])


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_an_empty_folder_and_none_at_all(error, tmp_path, clip, name):
    (tmp_path / "empty").mkdir()
    assert "there are no pictures in" in error("images", tmp_path / name, "--extractor", clip)


def test_one_picture_alone(radt, error, tmp_path, reals, clip):
    one = write_pictures(tmp_path / "one", [0])
    words = ["images", one, "--real", reals, "--extractor", clip]
    assert "fd cannot be measured: it needs at least 2 pictures in each set, and the smaller has 1" in error(
        *words, "--metrics", "fd"
    )
    code, out, _ = radt(*words, "--json")
    assert code == 0
    document = json.loads(out)
    assert {score["measure"] for score in document["scores"]} == {"cmmd", "clip-score", "copies"}
    assert "at least 6 pictures" in document["not_measured"]["coverage"]


def test_fewer_pictures_than_a_subset(error, pictures, reals, clip):
    words = ["images", pictures, "--real", reals, "--extractor", clip, "--metrics", "kid", "--subset-size", 50]
    assert "subsets of 50" in (sentence := error(*words))
    assert "the smaller has 14: give --subset-size 14 or less" in sentence


def test_the_bar_is_told_how_far_it_is(pictures):
    found, steps = find_pictures(str(pictures)), []
    options = Options(measures=("fd", "cmmd"), subsets=2)
    two = [Counting(), Counting()]
    measure_images(found, two, reals=found[:8], options=options, on_step=lambda done, of: steps.append((done, of)))
    total = 2 * (N + 8) + 2
    assert steps == [(14, total), (22, total), (36, total), (44, total), (45, total), (46, total)]


def test_what_cannot_be_measured_is_refused_before_the_work(pictures):
    found, idle = find_pictures(str(pictures)), Counting()
    for options in (Options(measures=("fd",)), Options(measures=("clip-score",))):
        with pytest.raises(QueryError, match="cannot be measured"):
            measure_images(found, [idle], options=options)
    with pytest.raises(ConfigError, match="the smaller has 3"):
        measure_images(found, [idle], reals=found[:3], options=Options(measures=("kid",), subset_size=9))
    assert idle.count == 0


def test_sizes_that_the_pictures_are_too_few_for_are_refused_before_the_work_though_nothing_is_named(
    error, radt, monkeypatch, pictures, reals, clip
):
    def never(*_, **__):
        raise AssertionError("features were extracted")

    monkeypatch.setattr("radt.evaluation.images.measure_set", never)
    words = ["images", pictures, "--real", reals, "--extractor", clip]
    assert "among 50 captions needs as many different ones, and there are 14" in error(*words, "--candidates", 50)
    assert "the smaller has 14: give --subset-size 14 or less" in error(*words, "--subset-size", 15)
    assert "no measure is named: give some of fd, kid" in error(*words, "--metrics", " , ")
    for size in (0, 1):
        code, _, err = radt(*words, "--subset-size", size)
        assert code == 2
        assert "--subset-size" in err
        with pytest.raises(ConfigError, match=f"subsets of 2 pictures or more, got --subset-size {size}"):
            Options(subset_size=size)
        with pytest.raises(ConfigError, match=f"among 2 captions or more, got --candidates {size}"):
            Options(candidates=size)


def test_without_matplotlib_the_extra_is_named_before_the_work(error, monkeypatch, pictures, clip, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["images", pictures, "--extractor", clip, "--out", tmp_path / "out"]
    assert "needs matplotlib, which is not installed: the extra brings it: pip install 'radt[eval]'" in error(*words)
    assert not (tmp_path / "out").exists()


def test_a_limit_of_no_reals_is_wrong_usage(radt, pictures, clip):
    code, _, err = radt("images", pictures, "--extractor", clip, "--limit-real", 5)
    assert code == 2
    assert "--limit-real is about the pictures of --real" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--subset-size", 5), "--subset-size has no effect without kid: it compares with real pictures"),
        (("--subset-size", 5, "--metrics", "clip-score"), "without kid: --metrics leaves it out"),
        (("--candidates", 5, "--metrics", "clip-score"), "--candidates has no effect without r-precision: --metrics"),
        (("--copy-limit", 0.9), "--copy-limit has no effect without copies: no picture says what its neighbours were"),
        (("--copy-limit", 0.95, "--metrics", "clip-score"), "without copies: --metrics leaves it out"),
        (("--subsets", 5), "coverage or is: it compares with real pictures; name them with --real; an image-text enc"),
        (("--subsets", 5, "--metrics", "clip-score"), "or is: --metrics leaves it out\n"),
    ],
)
def test_an_option_without_effect_is_refused_before_the_work(error, monkeypatch, pictures, clip, words, sentence):
    monkeypatch.setattr("radt.evaluation.images.measure_set", None)
    assert sentence in error("images", pictures, "--extractor", clip, *words)


def test_a_number_of_candidates_without_an_encoder_or_captions_is_refused(pictures, clip, tmp_path):
    bare = find_pictures(str(write_pictures(tmp_path / "bare", range(3), captions=False)))
    for found, extractor, reason in (
        (find_pictures(str(pictures)), Counting(), "it needs an image-text encoder"),
        (bare, load_extractor(clip), "no picture has a caption"),
    ):
        with pytest.raises(ConfigError, match=f"--candidates has no effect without r-precision: {reason}"):
            measure_images(found, [extractor], reals=found, options=Options(candidates=2))


def test_captions_that_no_measure_reads_are_wrong_usage(radt, pictures, clip, tmp_path):
    words = ["images", pictures, "--real", pictures, "--extractor", clip, "--metrics", "fd"]
    code, _, err = radt(*words, "--captions", tmp_path / "captions.csv")
    assert code == 2
    assert "--captions has no effect without clip-score" in err


def test_a_measure_that_nobody_knows(error, pictures, clip):
    words = ["images", pictures, "--extractor", clip, "--metrics"]
    assert "there is no measure 'fdd': did you mean 'fd'? It is one of fd, kid" in error(*words, "fdd")
    assert "fd cannot be measured: it compares with real pictures; name them with --real" in error(*words, "fd")


def test_what_is_not_measured_for_one_reason_is_told_in_one_line(radt, pictures, clip):
    code, out, _ = radt("images", pictures, "--extractor", clip)
    assert code == 0
    named = "fd, kid, cmmd, precision, recall, density, coverage"
    assert f"not measured: {named}: it compares with real pictures; name them with --real\n" in out


def test_measures_without_what_they_need(error, tmp_path, clip):
    bare = write_pictures(tmp_path / "bare", range(3), captions=False)
    words = ["images", bare, "--extractor"]
    assert "clip-score cannot be measured: no picture has a caption" in error(*words, clip, "--metrics", "clip-score")
    assert "it needs an image-text encoder" in error(*words, "timm:test_vit:untrained", "--metrics", "r-precision")
    assert "is no classifier" in error(*words, clip, "--metrics", "is")
    assert "nothing can be measured of these pictures: it compares with real pictures" in error(*words, clip)


def test_captions_that_speak_of_other_pictures(error, pictures, clip, tiny_kb, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\nelsewhere.png,a wolf\n")
    words = ["images", pictures, "--extractor", clip, "--captions"]
    assert "names none of the pictures" in error(*words, table)
    assert "cannot read the captions" in error(*words, tmp_path / "absent.csv")
    assert "is none: leave --captions out" in error("images", tiny_kb, "--extractor", clip, "--captions", table)
    table = tmp_path / "captions.jsonl"
    table.write_text("no json\n")
    assert "is no csv, tsv or jsonl file of captions" in error(*words, table)


def test_features_that_are_not_finite_name_the_picture(pictures):
    with pytest.raises(ModelError, match=r"gave no finite features for 14 of 14 pictures, the first is '000.png'"):
        measure_set(find_pictures(str(pictures)), Counting(broken=True), on_step=lambda done, of: None)


@pytest.mark.parametrize("place", ["pictures/out", "pictures", "."])
def test_own_results_are_not_measured_as_pictures(radt, pictures, clip, tmp_path, place):
    out = tmp_path / place
    words = ["images", pictures, "--extractor", clip, "--metrics", "clip-score", "--json", "--out", out]
    for _ in range(2):
        assert json.loads(radt(*words)[1])["n"] == N
    assert (out / "plot.png").is_file()


def test_names_that_are_not_utf8_are_written_with_escapes(radt, clip, tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / os.fsdecode(b"\xe4"), range(3))
    (folder / os.fsdecode(b"\xf6.png")).write_bytes(encode(draw(3)))
    (folder / os.fsdecode(b"\xfc.png")).write_bytes(b"no picture")
    out = tmp_path / os.fsdecode(b"out-\xe4")
    words = ["images", folder, "--real", folder, "--extractor", clip, "--metrics", "cmmd,copies", "--out", out]
    monkeypatch.setattr("sys.argv", ["radt", "evaluate", *map(str, words)])
    code, text, err = radt(*words)
    assert code == 0, err
    assert r"left out, 1 of the pictures: \udcfc.png (" in text
    document = json.loads((out / "results.json").read_text())
    assert document["pictures"] == document["real"] == str(tmp_path / r"\udce4")
    assert document["n"] == 4
    assert r"images '" in document["command"]
    assert f"`{tmp_path}/\\udce4`" in (out / "results.md").read_text()
    assert Result.load(out / "images.result.json").title == r"Measures of pictures: \udce4"
    assert json.loads(radt(*words, "--json")[1])["left_out"][0]["name"] == r"\udcfc.png"


def test_reading_a_file_that_went_away(tmp_path):
    found = find_pictures(str(write_pictures(tmp_path / "a", range(2))))
    (tmp_path / "a" / "000.png").unlink()
    measured = measure_set(found, Counting(), on_step=lambda done, of: None)
    assert [each.reason for each in measured.left_out] == ["it cannot be read (No such file or directory)"]
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(CorpusError, match="none of 2 pictures can be read"):
        measure_set(found, Counting(), on_step=lambda done, of: None)


def test_without_an_extractor_nothing_is_measured(pictures):
    with pytest.raises(ConfigError, match="without an extractor"):
        measure_images(find_pictures(str(pictures)), [], options=Options())
    with pytest.raises(ConfigError, match="2 or more subsets"):
        Options(subsets=1)


# Retrieval


@pytest.fixture
def ask(radt, tiny_kb, tmp_path):
    """Run `radt evaluate retrieval` with these lines. (exit code, stdout, stderr)."""

    def call(text, *words, suffix=".txt"):
        queries = tmp_path / f"queries{suffix}"
        queries.write_text(text)
        return radt("retrieval", "--kb", tiny_kb, "--queries", queries, *words)

    return call


def test_retrieval_of_words_that_one_caption_has(ask, tiny_kb, tmp_path):
    from index.knowledge_base import KnowledgeBase

    ids = {
        pair.caption: pair.id
        for pair in KnowledgeBase.open(tiny_kb).store.get(KnowledgeBase.open(tiny_kb).store.matching_ids())
    }
    lines = [f"{caption_of(3)}\t{ids[caption_of(3)]}", f"{caption_of(5)}\tcaption LIKE '%number 5'"]
    code, out, err = ask("\n".join(lines), "--json", "-k", 1, "-k", 12, "--out", tmp_path / "out")
    assert code == 0, err
    document = json.loads(out)
    assert (document["n"], document["pairs"], document["relevant_median"]) == (2, 12, 1)
    assert set(document["scores"]) == {"clip", "bm25", "hybrid"}
    for by, score in document["scores"].items():
        assert score["recall@12"]["value"] == score["hit@12"]["value"] == 1, by  # all pairs are hits
        low, high = score["mrr"]["interval"] or (0, 1)
        assert low <= score["mrr"]["value"] <= high
    assert document["scores"]["bm25"]["recall@1"]["value"] == 1
    assert document["scores"]["bm25"]["mrr"]["value"] == 1
    stored = Result.load(tmp_path / "out" / "retrieval.result.json")
    assert stored.tables[0].columns == ("", "clip", "bm25", "hybrid")


def test_retrieval_prints_a_table_and_reads_json_lines(ask):
    text = json.dumps({"query": "red", "where": "caption LIKE '%red%'"}) + "\n"
    code, out, err = ask(text, "--by", "bm25", suffix=".jsonl")
    assert code == 0, err
    assert "1 queries to 12 pairs" in out
    assert "recall@5" in out
    # numbers 0 and 10 are red
    assert "1.00 (0.21 to 1.00)" in out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a red circle\n", "says not which pairs are relevant"),
        ("red\t99999\n", "there is no pair 99999 in the knowledge base"),
        ("red\tcaption LIKE 'nothing%'\n", "no pair fulfils \"caption LIKE 'nothing%'\""),
        ("red\tnofield > 3\n", "nofield"),
        ("", "is empty"),
    ],
)
def test_queries_that_cannot_be_judged(ask, text, sentence):
    code, out, err = ask(text)
    assert (code, out) == (1, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_json_queries_that_cannot_be_judged(ask):
    for text, sentence in (
        ("no json", "is no object with"),
        ('{"query": 3, "relevant": [1]}', "should have a text"),
        ('{"query": "red", "relevant": ["x"]}', "should have a text"),
        ('{"query": "red"}', "says not which pairs are relevant"),
    ):
        code, _, err = ask(text, suffix=".jsonl")
        assert code == 1
        assert sentence in err


def test_a_kind_of_search_that_there_is_not(ask):
    code, _, err = ask("red\tcaption LIKE '%red%'", "--by", "magic")
    assert code == 1
    assert "one searches by clip, bm25, tfidf, hybrid, got 'magic'" in err


def test_neither_command_imports_torch_to_show_its_help():
    script = (
        "import sys\nfrom radt.cli import app\ntry:\n    app(['evaluate', 'images', '--help'])\nexcept SystemExit:\n"
        "    pass\nprint([name for name in ('torch', 'numpy', 'matplotlib', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert Path(image_set.__file__).is_file()
