"""What the doctor finds in a run's numbers: made-up histories whose illness is known, and formulas beside twins."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from index.config import to_dict
from index.errors import ConfigError
from radt.presets import PRESETS
from radt.training import doctor
from radt.training.data import DataConfig
from radt.training.doctor import (
    examine_run,
    judge_dropping,
    judge_finite,
    judge_gradient,
    judge_loss,
    judge_reading,
    prob_of_no_neighbors,
)
from radt.training.pack import Pack
from radt.training.probe import Reading
from radt.training.reference import Curve, Life, Point, load_curves, thin
from radt.training.run_folder import RunFolder, choose_curve, nearest_preset, read_lines
from tests.packs import CANDIDATES, NUM_SCENES, small_pack


def history(losses: list[float], norms: list[float] | None = None) -> tuple[dict[str, float], ...]:
    norms = norms or [0.1] * len(losses)
    return tuple(
        {"step": i + 1, "images_seen": 10 * (i + 1), "loss": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    )


def curve(losses: list[float], **changes: Any) -> Curve:
    points = tuple(
        Point(images_seen=100.0 * (i + 1), loss=loss, loss_low=loss, loss_high=loss) for i, loss in enumerate(losses)
    )
    return Curve(**{"preset": "tiny", "source": "made up", "config": {}, "points": points} | changes)


def reading(**changes: float) -> Reading:
    values = {"loss": 0.09, "loss_without": 0.1, "loss_shuffled": 0.1, "attention_right": 0.3, "attention_wrong": 0.03}
    return Reading(**(values | changes), examples=32)


def test_a_loss_that_is_no_number_is_an_error_and_names_the_first_step() -> None:
    assert judge_finite(history([1.0, 0.5])).state == "ok"
    for bad in (math.nan, math.inf):
        found = judge_finite(history([1.0, bad, bad]))
        assert found.state == "error"
        assert "diverged at step 2" in found.detail
    assert judge_finite(history([1.0, 1.0], [0.1, math.nan])).state == "error"


def test_a_gradient_that_leaps_or_grows_is_a_warning() -> None:
    calm = [0.1 + 0.02 * (i % 3) for i in range(100)]
    assert judge_gradient(history([1.0] * 100, calm)).state == "ok"
    leaping = [*calm[:60], 5.0, *calm[61:]]
    found = judge_gradient(history([1.0] * 100, leaping))
    assert (found.state, "leaps 1 times, at step 61" in found.detail) == ("warning", True)
    growing = [0.1 * 1.03**i for i in range(100)]
    found = judge_gradient(history([1.0] * 100, growing))
    assert (found.state, found.detail.startswith("grows")) == ("warning", True)
    lately = [1.0] * 30 + [9.0] * 9  # no whole stretch from the beginning has them
    assert judge_gradient(history([1.0] * 39, lately)).state == "warning"
    falling = [1.2 * 0.95**i for i in range(100)]  # as every healthy run does
    assert judge_gradient(history([1.0] * 100, falling)).state == "ok"
    assert judge_gradient(history([1.0] * 5, [0.1] * 4 + [9.0])).state == "ok"  # too few to judge


def test_a_loss_is_held_beside_the_reference_at_as_many_images_seen() -> None:
    falling = curve([1.0, 0.5, 0.25])  # at 100, 200, 300
    assert falling.loss_at(150) == pytest.approx(0.75)
    assert falling.loss_at(50) is None
    assert falling.loss_at(9999) == 0.25
    at_200 = history([1.0] * 14 + [0.5] * 11)  # the last ten lines lie around 205 images
    found = judge_loss(at_200, falling)
    assert found.state == "ok"
    assert found.detail.startswith("1.03 times")
    far = judge_loss(history([1.0] * 25), falling)
    assert far.state == "warning"
    assert far.detail.startswith("2.05 times")
    assert judge_loss(history([1.0] * 3), falling).detail == "too early to compare"
    assert judge_loss(at_200, None).state == "unknown"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": 0.1}, "worth next to nothing"),
        ({"attention_right": 0.01, "attention_wrong": 0.001}, "all attention goes to none"),
        ({"attention_right": 0.3, "attention_wrong": 0.25}, "nearly the same attention"),
    ],
)
def test_neighbours_without_life_are_a_warning_but_not_early_on(changes: dict[str, float], said: str) -> None:
    found = judge_reading(reading(**changes), early=False, expected=None)
    assert found.state == "warning"
    assert said in found.detail
    assert judge_reading(reading(**changes), early=True, expected=None).state == "ok"


def test_the_worth_of_neighbours_is_held_beside_the_reference() -> None:
    assert judge_reading(reading(), early=False, expected=None).state == "ok"
    assert judge_reading(reading(), early=False, expected=0.12).state == "ok"
    assert judge_reading(reading(loss=0.098), early=False, expected=0.12).state == "warning"  # a gain of 0.02
    assert judge_reading(reading(loss=0.098), early=False, expected=None).state == "ok"


def brute_force(pack: Pack, data: DataConfig) -> float:
    """Every order of the candidates, every neighbour by itself."""
    chances = []
    for k, scene in itertools.product(data.num_neighbors, pack.scene_neighbors.tolist()):
        for chosen in itertools.permutations(scene[: max(k, data.candidates)], k):
            gone = [data.missing_prob if c >= 0 else 1 - data.wrong_prob * (1 - data.missing_prob) for c in chosen]
            chances.append((len(list(itertools.permutations(range(max(k, data.candidates)), k))), math.prod(gone)))
    weights = sum(1 / n for n, _ in chances)
    alone = sum(chance / n for n, chance in chances) / weights
    return data.drop_neighbors_prob + (1 - data.drop_neighbors_prob) * alone


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(),
        DataConfig(num_neighbors=(1,), candidates=1, missing_prob=0.5, wrong_prob=0.0),
        DataConfig(num_neighbors=(3,), candidates=CANDIDATES, missing_prob=0.3, wrong_prob=0.7),
        DataConfig(num_neighbors=(2, 4), candidates=3, drop_neighbors_prob=0.0),
    ],
)
def test_the_chance_of_no_neighbour_is_exact(data: DataConfig) -> None:
    assert prob_of_no_neighbors(small_pack(), data) == pytest.approx(brute_force(small_pack(), data), abs=1e-12)


def test_dropping_as_asked_for_is_well() -> None:
    found = judge_dropping(small_pack(), DataConfig(drop_text_prob=0.2, drop_neighbors_prob=0.3))
    assert found.state == "ok", found


def test_a_branch_that_is_never_trained_is_a_warning() -> None:
    found = judge_dropping(small_pack(), DataConfig(drop_text_prob=0.0))
    assert found.state == "warning"
    assert "data.drop_text_prob" in found.remedy


def test_a_pack_of_scenes_without_candidates_is_a_warning() -> None:
    pack = small_pack()
    empty = pack.scene_neighbors.clone()
    empty[: NUM_SCENES // 2] = -1
    found = judge_dropping(dataclasses.replace(pack, scene_neighbors=empty), DataConfig(wrong_prob=0.0))
    assert found.state == "warning"
    assert "many examples see no neighbour" in found.detail


def test_dropping_otherwise_than_asked_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "drawn_shares", lambda pack, data: (0.1, 0.25))
    found = judge_dropping(small_pack(), DataConfig())
    assert found.state == "warning"
    assert "not as often as asked for" in found.detail


def test_a_run_is_held_beside_one_that_began_alike() -> None:
    cold = curve([1.0], config={"start": None, "prediction": "v", "weighting": "v"})
    warm = curve([0.1], config={"start": "stage0", "prediction": "v", "weighting": "v"})
    other = curve([0.1], config={"start": None, "prediction": "x0", "weighting": "x0"})
    raw = {"prediction": "v", "weighting": "v"}
    assert choose_curve([other, warm, cold], raw) is cold
    assert choose_curve([cold, warm], {**raw, "start": "there"}) is warm
    assert choose_curve([cold], {**raw, "start": "there"}) is cold
    assert choose_curve([warm], raw) is None  # from nothing, a run is above one from trained weights for long


def test_a_contrastive_loss_is_held_beside_one_of_as_large_a_batch() -> None:
    reference = curve([1.0], config={"batch_size": 256})
    assert choose_curve([reference], {"batch_size": 256}) is reference
    assert choose_curve([reference], {"batch_size": 64}) is None
    stage = curve([1.0], config={"prediction": "v", "data": {"batch_size": 64}})  # a mean over the batch's examples
    assert choose_curve([stage], {"prediction": "v", "data": {"batch_size": 16}}) is stage


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_fields(name: str) -> None:
    raw = to_dict(PRESETS[name]())
    if "optim" in raw:
        raw["optim"]["lr"] = 0.123
    assert nearest_preset(raw) == name


def test_the_curves_that_ship_are_whole_and_say_where_they_come_from() -> None:
    runs = [
        *((preset, "") for preset in ("emoji-demo", "emoji-demo-sr", "clip-emoji", "recognizer-emoji")),
        *(("emoji-demo-fast", phase) for phase in ("guided", "16-steps", "8-steps")),
    ]
    for preset, phase in runs:
        assert any(each.from_nothing for each in load_curves(preset, phase)), preset
    for each in (curve for run in runs for curve in load_curves(*run)):
        assert "radt train" in each.source or "the same run" in each.source
        seen = [point.images_seen for point in each.points]
        assert seen == sorted(seen)
        assert len(seen) <= 50
        assert all(0 < point.loss_low <= point.loss <= point.loss_high for point in each.points)
        assert "/" not in json.dumps([each.config.get(name) for name in ("clip", "start", "below", "bundle")])
    assert load_curves("imagen-64") == []


def test_thinning_keeps_the_shape_of_a_curve() -> None:
    lines = history([1 / (i + 1) for i in range(1000)])
    points = thin(lines)
    assert len(points) <= 50
    for point in points[5:]:
        assert point.loss == pytest.approx(10 / point.images_seen, rel=0.1)
        assert point.loss_low < point.loss < point.loss_high
    thinned = curve([], points=points, life=(Life(images_seen=5, gain=0.1, attention_right=0.5, attention_wrong=0.1),))
    assert thinned.gain_at(4) is None
    assert thinned.gain_at(6) == 0.1


def test_half_a_line_and_what_are_no_metrics_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == ()
    path.write_text('{"step": 1, "images_seen": 4, "loss": NaN}\n[]\n{"step": 2}\nnonsense\n{"step": 2, "ima')
    (line,) = read_lines(path)
    assert math.isnan(line["loss"])


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        examine_run(tmp_path)


def write_run(folder: Path, lines: list[dict[str, Any]]) -> dict[str, str]:
    """A run of another version, of which only the numbers are looked at; the states found."""
    raw = to_dict(PRESETS["tiny"]())
    raw["data"]["of_another_version"] = 2
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    diagnosis = examine_run(folder)
    assert diagnosis.lines()
    return {finding.name: finding.state for finding in diagnosis.findings}


def test_a_run_of_another_version_is_judged_by_what_it_logged(tmp_path: Path) -> None:
    found = write_run(tmp_path, [dict(line) for line in history([1.0] * 30)])
    assert found == {"loss": "ok", "gradient": "ok", "reference curve": "unknown", "config": "unknown"}


def test_images_seen_are_counted_as_the_run_did_it_in_several_processes(tmp_path: Path) -> None:
    raw = to_dict(PRESETS["tiny"]())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert doctor._images_a_step(RunFolder(tmp_path)) == raw["data"]["batch_size"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "images_seen": 80, "loss": 1.0}\n')
    assert doctor._images_a_step(RunFolder(tmp_path)) == 8


def test_a_run_that_has_logged_nothing_is_unknown(tmp_path: Path) -> None:
    assert write_run(tmp_path, []) == {"loss": "unknown", "config": "unknown"}
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps(to_dict(PRESETS["clip-emoji"]())))
    diagnosis = examine_run(clip)
    assert [finding.state for finding in diagnosis.findings] == ["unknown"]
    assert "metrics.jsonl" in "\n".join(diagnosis.lines())


def test_lines_without_a_loss_are_passed_over(tmp_path: Path) -> None:
    good: list[dict[str, Any]] = [dict(line) for line in history([1.0] * 12)]
    bad = [{"step": 13, "images_seen": 130}, {"step": 14, "images_seen": 140, "loss": None}]
    assert write_run(tmp_path, [bad[0], *good, *bad])["loss"] == "ok"
    assert write_run(tmp_path, bad)["loss"] == "unknown"
    without_norm = {"step": 13, "images_seen": 130, "loss": 1.0, "grad_norm": None}
    assert write_run(tmp_path, [*good, without_norm])["gradient"] == "ok"


def test_a_gradient_of_zero_is_a_warning() -> None:
    norms = [0.1] * 30 + [0.0] * 30 + [0.1] * 30
    found = judge_gradient(history([1.0] * 90, norms))
    assert (found.state, "is 0" in found.detail) == ("warning", True)
    assert judge_gradient(history([1.0] * 40, [0.0] * 40)).state == "warning"


@pytest.mark.parametrize("text", ["[]", "3", "null", '"run"'])
def test_a_configuration_that_is_no_object_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is no run folder .*holds no object"):
        examine_run(tmp_path)


@pytest.mark.parametrize(
    ("num_neighbors", "missing_prob"), [((1, 2, 4), 0.5), ((1, 2, 4), 0.7), ((1, 1, 1, 4), 0.5), ((1, 2, 3, 4), 0.3)]
)
def test_dropping_as_asked_for_is_well_whatever_the_counts(num_neighbors: tuple[int, ...], missing_prob: float) -> None:
    """A share that hangs on K, of which each batch has one: it must not be judged by the luck of a few batches."""
    data = DataConfig(num_neighbors=num_neighbors, missing_prob=missing_prob)
    found = judge_dropping(small_pack(), data)
    assert "not as often as asked for" not in found.detail
    _, neighbors = doctor.drawn_shares(small_pack(), data)
    assert neighbors == pytest.approx(prob_of_no_neighbors(small_pack(), data), abs=0.03)


def test_the_share_of_dropped_examples_is_that_of_the_batches() -> None:
    text, neighbors = doctor.drawn_shares(small_pack(), DataConfig(drop_text_prob=1.0, drop_neighbors_prob=1.0))
    assert (text, neighbors) == (1.0, 1.0)
    before = torch.get_rng_state()
    text, _ = doctor.drawn_shares(small_pack(), DataConfig(drop_text_prob=0.0))
    assert text == 0.0
    assert torch.equal(torch.get_rng_state(), before)
