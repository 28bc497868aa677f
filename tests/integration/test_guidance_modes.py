"""Every sampler and kind of guidance from the command line into the PNG, and out of it again bit for bit."""

from pathlib import Path

import pytest

from radt.cli import app
from radt.provenance import read_png, replay
from tests.shell import Shell

WAYS = [
    ["--sampler", "stochastic"],
    ["--sampler", "ancestral", "--gamma", "0.5"],
    ["--guidance", "joint", "--text-guidance", "3", "--neighbor-guidance", "2"],
    ["--guidance", "joint", "--guidance-interval", "0.3", "0.8", "--sampler", "heun"],
    ["--oscillate-to", "1", "--oscillate-after", "1", "--text-guidance", "9", "--order", "coin"],
    ["--negative-prompt", "a blue square", "--neighbor-interval", "0.5", "1"],
    ["--threshold", "dynamic", "--percentile", "0.9"],
]


@pytest.fixture
def shell(capsys):
    """`radt` in this process."""
    shell = Shell(capsys, None)
    shell.app = app
    return shell


@pytest.mark.parametrize("options", WAYS, ids=lambda options: " ".join(options))
def test_what_was_typed_is_in_the_png_and_replays(shell, tiny_bundle, tiny_kb, tmp_path, options):
    where = ["--model", str(tiny_bundle), "--kb", str(tiny_kb), "--device", "cpu", "--out", str(tmp_path)]
    (image,) = shell.json("generate", "a red circle", *where, *options)["images"]
    _, record = read_png(Path(image["path"]))
    for option, value in pairs(options):
        assert image["settings"][option] == value
        recorded = getattr(record.settings, option)
        assert (list(recorded) if isinstance(recorded, tuple) else recorded) == value
    assert replay(Path(image["path"]), tiny_bundle).identical


def pairs(options):
    """Options as fields and values: `--a-b 1 2` is ("a_b", [1.0, 2.0])."""
    given = {}
    for word in options:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            given[name] = []
        else:
            given[name].append(float(word) if word.replace(".", "").isdigit() else word)
    return [(name, values if len(values) > 1 else values[0]) for name, values in given.items()]


def test_the_rows_that_an_interval_saves_are_told(shell, tiny_bundle, tiny_kb, tmp_path):
    """Three steps at t = 1, 2/3 and 1/3; only the second is guided. Interleaved two rows, joint three."""
    where = ["--model", str(tiny_bundle), "--kb", str(tiny_kb), "--device", "cpu", "--out", str(tmp_path)]
    asked = ["generate", "a red circle", *where, "--guidance-interval", "0.5", "0.9"]
    assert shell.json(*asked)["images"][0]["network"] == {"calls": 3, "guided": 1, "rows": 4}
    joint = ["--guidance", "joint", "--neighbor-guidance", "3"]
    assert "3 network calls, 2 of them without guidance: 5 rows" in shell(*asked, *joint, "--explain")[1]


def test_what_would_have_no_effect_is_one_sentence(shell, tiny_bundle, tiny_kb):
    where = ["--model", str(tiny_bundle), "--kb", str(tiny_kb)]
    assert "ancestral" in shell.error("generate", "a red circle", *where, "--gamma", "0.5")
    negative = ["--negative-prompt", "blue", "--text-guidance", "1"]
    assert "negative_prompt" in shell.error("generate", "a red circle", *where, *negative)
