import json
import os

import pytest

from index.errors import ConfigError, CorpusError
from radt.evaluation.results import Estimate, Line, Picture, Plot, Result, Table, find_results, typed_command


def full(kind="emoji-draw", **changes):
    return Result(
        kind=kind,
        title="EmojiDrawBench",
        command="radt evaluate emoji-draw",
        date="2026-11-22T00:00:00+00:00",
        facts={"n": 100, "model": "emoji-demo"},
        tables=(
            Table(
                title="By arm",
                columns=("arm", "top-1", "n", "s"),
                rows=(("with", Estimate(value=0.84, low=0.76, high=0.9), 100, 0.5), ("without", None, 100, 2.0)),
            ),
        ),
        plots=(
            Plot(title="dial", x="eta", y="share", lines=(Line(name="a", x=(0.0, 1.0), y=(1.0, 0.5)),), log_x=True),
            Plot(title="k", x="k", y="share", lines=(Line(name="b", x=(1.0,), y=(0.5,), low=(0.4,), high=(0.6,)),)),
        ),
        pictures=(Picture(file="sheet-1.png", title="twenty"),),
        data={"anything": [1, None, {"deep": "yes"}]},
        **changes,
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    assert Result.load(full().save(tmp_path)) == full()


def test_results_are_found_at_any_depth_once_and_in_order(tmp_path):
    full("b").save(tmp_path / "two")
    full("a").save(tmp_path / "two" / "deep")
    (tmp_path / "two" / "results.json").write_text("{}")
    found = list(find_results([tmp_path, tmp_path / "two"]))
    assert [(folder.name, result.kind) for folder, result in found] == [("two", "b"), ("deep", "a")]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("kind"),
        lambda v: v.update(format=2),
        lambda v: v.pop("format"),
        lambda v: v.update(tabels=[]),
        lambda v: v["tables"][0]["rows"][0].pop(),
    ],
)
def test_a_file_that_is_no_result_is_one_sentence(tmp_path, change):
    path = full().save(tmp_path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CorpusError, match="is no stored result"):
        Result.load(path)


def test_a_file_cut_short_and_a_missing_folder_are_one_sentence(tmp_path):
    path = full().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="is no stored result"):
        Result.load(path)
    with pytest.raises(CorpusError, match="there is no folder"):
        list(find_results([tmp_path / "none"]))


def test_numbers_that_json_cannot_say_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Result(kind="x", title="x", command="x", data={"a": float("nan")}).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ConfigError, match="lies in its interval"):
        Estimate(value=0.5, low=0.6, high=0.7)
    with pytest.raises(ConfigError, match="2 columns and a row of 1"):
        Table(title="t", columns=("a", "b"), rows=((1,),))
    with pytest.raises(ConfigError, match="as many x as y"):
        Line(name="l", x=(1.0, 2.0), y=(1.0,))
    with pytest.raises(ConfigError, match="both bounds"):
        Line(name="l", x=(1.0,), y=(1.0,), low=(1.0,))
    with pytest.raises(ConfigError, match="own folder"):
        Picture(file="../secret.png", title="")


def test_the_command_is_as_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/radt", "evaluate", "emoji-draw", "--where", "a b"])
    assert typed_command() == "radt evaluate emoji-draw --where 'a b'"
    monkeypatch.setattr("sys.argv", ["tools/bench_quality.py", "-n", "100"])
    assert typed_command() == "python tools/bench_quality.py -n 100"
    monkeypatch.setattr("sys.argv", ["radt", "evaluate", "images", os.fsdecode(b"\xe4")])
    assert typed_command() == r"radt evaluate images '\udce4'"
