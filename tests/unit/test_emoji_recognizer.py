"""The trained recogniser: its pictures, its training, its folder, and that it stays apart from what it judges."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from index.errors import ConfigError, ModelError
from radt.bundle import default_bundle
from radt.corpora.emoji import GlyphRenderer, compose, load_entities, placement_layer, select
from radt.corpora.scenes import PALETTE, benchmark_prompt, render_scene
from radt.evaluation import emoji_recognizer
from radt.evaluation.emoji_recognizer import EmojiRecognizer, find_recognizer
from radt.presets import PRESETS
from radt.recognizer_network import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    RecognizerConfig,
    RecognizerNetwork,
    crop_box,
    save_recognizer,
    to_frame,
)
from radt.training import recognizer as training
from radt.training.checkpoint import load_state
from radt.training.divergence import DivergedError
from radt.training.optim import OptimConfig
from radt.training.recognizer import GlyphPictures, RecognizerTrainConfig, recognizer_emoji, train_recognizer

ENTITIES = load_entities()[::187]  # 10 or 11, of many groups
TINY = RecognizerTrainConfig(
    network=RecognizerConfig(image_size=16, widths=(16, 32), feature_width=24),
    num_steps=40,
    batch_size=32,
    optim=OptimConfig(lr=4e-3, warmup_steps=2, cooldown_share=0.5),
    precision="no",
    save_every=10,
)


@pytest.fixture(scope="module")
def glyphs() -> GlyphRenderer:
    return GlyphRenderer()


@pytest.fixture(scope="module")
def run_folder(glyphs: GlyphRenderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recognizer")
    train_recognizer(TINY, out, entities=ENTITIES, glyphs=glyphs)
    return out


@pytest.fixture(scope="module")
def recognizer(run_folder: Path) -> EmojiRecognizer:
    return EmojiRecognizer.load(run_folder / training.MODEL_FOLDER)


@pytest.fixture(scope="module")
def pictures(glyphs: GlyphRenderer) -> np.ndarray:
    return np.stack([render_scene(benchmark_prompt(entity, "teal"), glyphs, 32) for entity in ENTITIES])


class TestTraining:
    def test_a_few_steps_tell_a_few_emoji_apart(self, run_folder: Path) -> None:
        lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [20, 40]
        accuracy = json.loads((run_folder / "accuracy.json").read_text())
        assert accuracy["entities"] == len(ENTITIES)
        for name in ("alone_128", "alone_32", "counted_128", "counted_32"):
            assert accuracy[name]["top1"] >= 0.7, name  # chance is one in ten
            assert accuracy[name]["top1"] <= accuracy[name]["top5"] <= 1

    def test_a_run_that_was_cut_is_the_unbroken_one(
        self, glyphs: GlyphRenderer, run_folder: Path, tmp_path: Path
    ) -> None:
        def cut(metrics: dict[str, float]) -> None:
            if metrics["step"] == 15:
                raise RuntimeError("the process dies here")

        with pytest.raises(RuntimeError, match="dies"):
            train_recognizer(TINY, tmp_path, entities=ENTITIES, glyphs=glyphs, on_step=cut)
        steps: list[float] = []
        train_recognizer(TINY, tmp_path, entities=ENTITIES, glyphs=glyphs, on_step=lambda m: steps.append(m["step"]))
        assert steps == list(range(11, 41))  # from the last state, of step 10
        whole, resumed = (folder / training.MODEL_FOLDER / WEIGHTS_FILE for folder in (run_folder, tmp_path))
        assert whole.read_bytes() == resumed.read_bytes()

    def test_a_run_of_another_configuration_is_refused(self, glyphs: GlyphRenderer, run_folder: Path) -> None:
        with pytest.raises(ConfigError, match="noise was"):
            train_recognizer(replace(TINY, noise=0.3), run_folder, entities=ENTITIES, glyphs=glyphs)

    def test_the_preset_is_one_of_those_of_train(self) -> None:
        assert PRESETS["recognizer-emoji"]() == recognizer_emoji()

    def test_a_run_that_diverges_says_so_and_keeps_nothing_of_it(self, glyphs: GlyphRenderer, tmp_path: Path) -> None:
        wild = replace(TINY, optim=replace(TINY.optim, lr=1e30, warmup_steps=0), save_every=1)
        with pytest.raises(DivergedError, match="training diverged at step"):
            train_recognizer(wild, tmp_path, entities=ENTITIES, glyphs=glyphs)
        assert not (tmp_path / training.MODEL_FOLDER).exists()
        assert not (tmp_path / training.ACCURACY_FILE).exists()
        last = json.loads((tmp_path / training.METRICS_FILE).read_text().splitlines()[-1])
        assert not all(np.isfinite([last["loss"], last["grad_norm"]]))
        _, facts = load_state(tmp_path / training.STATE_FILE)
        assert facts["step"] == last["step"] - 1

    def test_an_answer_that_is_not_a_number_is_never_right(
        self, glyphs: GlyphRenderer, recognizer: EmojiRecognizer
    ) -> None:
        spoiled = RecognizerNetwork(recognizer.network.config, len(recognizer.classes)).eval()
        with torch.no_grad():
            spoiled.to_classes.bias.fill_(torch.nan)
        found = training.measure_accuracy(spoiled, recognizer.classes, ENTITIES, glyphs)
        assert (found["alone_128"]["top1"], found["alone_128"]["top5"]) == (0, 0)

    @pytest.mark.parametrize(
        "change",
        [
            {"batch_size": 1},
            {"num_steps": 0},
            {"least_scale": 0.0},
            {"least_scale": 2.0},
            {"label_smoothing": 2.0},
            {"clutter_prob": -0.1},
            {"palette_prob": float("nan")},
            {"precision": "fp16"},
        ],
    )
    def test_what_cannot_be_trained_is_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(ConfigError):
            replace(TINY, **change)

    @pytest.mark.parametrize("change", [{"image_size": 20}, {"widths": ()}, {"feature_width": 0}])
    def test_sizes_that_do_not_fit_are_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(ConfigError):
            replace(TINY.network, **change)


class TestPictures:
    def test_a_batch_depends_on_the_step_alone(self, glyphs: GlyphRenderer) -> None:
        one, other = (GlyphPictures(ENTITIES, glyphs, config=TINY) for _ in range(2))
        other.batch(3)
        for a, b in zip(one.batch(7), other.batch(7), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(one.batch(7)[0], one.batch(8)[0])

    def test_they_are_in_range_and_every_class_comes(self, glyphs: GlyphRenderer) -> None:
        source = GlyphPictures(ENTITIES, glyphs, config=TINY)
        pixels, labels = source.batch(0)
        assert pixels.shape == (32, 3, 16, 16)
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        assert {source.classes[i] for i in labels.tolist()} <= {entity.class_id for entity in ENTITIES}
        seen = torch.cat([source.batch(step)[1] for step in range(8)])
        assert len(seen.unique()) == len(source.classes)

    def test_without_any_change_a_picture_is_the_scene_itself(self, glyphs: GlyphRenderer) -> None:
        still = replace(
            TINY,
            network=RecognizerConfig(image_size=64, widths=(16, 32), feature_width=24),
            least_scale=1.0,
            most_scale=1.0,
            angle=0.0,
            shift=0.0,
            gain=0.0,
            noise=0.0,
            clutter_prob=0.0,
            palette_prob=1.0,
        )
        source = GlyphPictures(ENTITIES[:1], glyphs, config=still)
        layer = placement_layer(glyphs.glyph(ENTITIES[0]), (0.0, 0.0, 1.0, 1.0), training.GLYPH_SIDE)
        found = []
        for step in range(12):  # some of them at full sharpness
            for pixels in source.batch(step)[0]:
                picture = ((pixels.permute(1, 2, 0) + 1) * 127.5).numpy()
                drawn = compose(layer, np.rint(picture[0, 0]).astype(np.uint8))
                found.append(float(np.abs(picture - drawn).max()))
        assert min(found) < 2.0

    def test_a_shift_moves_the_ink_right_and_down(self, glyphs: GlyphRenderer) -> None:
        layer = torch.from_numpy(
            placement_layer(glyphs.glyph(ENTITIES[0]), (0.3, 0.3, 0.7, 0.7), 64).transpose(2, 0, 1).copy()
        )[None]

        def center(layers: torch.Tensor) -> tuple[float, float]:
            alpha = layers[0, 3].float()
            grid = (torch.arange(64) + 0.5) / 64
            return float((alpha.sum(0) * grid).sum() / alpha.sum()), float((alpha.sum(1) * grid).sum() / alpha.sum())

        moved = training._warp(layer, scale=torch.ones(1), angle=torch.zeros(1), shift=torch.tensor([[0.2, 0.1]]))
        (x0, y0), (x1, y1) = center(layer), center(moved)
        assert (x1 - x0, y1 - y0) == pytest.approx((0.2, 0.1), abs=0.005)


class TestFolder:
    def test_a_round_trip_is_exact(self, recognizer: EmojiRecognizer, pictures: np.ndarray, tmp_path: Path) -> None:
        save_recognizer(tmp_path / "again", recognizer.network, recognizer.classes)
        again = EmojiRecognizer.load(tmp_path / "again")
        assert (again.classes, again.digest) == (recognizer.classes, recognizer.digest)
        assert np.array_equal(again.logits(pictures), recognizer.logits(pictures))
        assert np.array_equal(again.features(pictures), recognizer.features(pictures))

    def test_the_digest_changes_with_any_weight(self, recognizer: EmojiRecognizer, tmp_path: Path) -> None:
        with torch.no_grad():
            changed = RecognizerNetwork(recognizer.network.config, len(recognizer.classes))
            changed.load_state_dict(recognizer.network.state_dict())
            changed.to_classes.bias[0] += 1
        assert save_recognizer(tmp_path / "other", changed, recognizer.classes) != recognizer.digest

    def test_exchanged_or_missing_weights_are_told(self, recognizer: EmojiRecognizer, tmp_path: Path) -> None:
        other = RecognizerNetwork(recognizer.network.config, len(recognizer.classes))
        save_recognizer(tmp_path / "a", recognizer.network, recognizer.classes)
        save_recognizer(tmp_path / "b", other, recognizer.classes)
        (tmp_path / "a" / WEIGHTS_FILE).write_bytes((tmp_path / "b" / WEIGHTS_FILE).read_bytes())
        with pytest.raises(ModelError, match="are not those that"):
            EmojiRecognizer.load(tmp_path / "a")
        (tmp_path / "a" / WEIGHTS_FILE).write_bytes(b"half a file")
        with pytest.raises(ModelError, match="no emoji recogniser"):
            EmojiRecognizer.load(tmp_path / "a")

    def test_where_there_is_none_the_sentence_names_the_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(emoji_recognizer, "FOLDER", tmp_path / "none")
        with pytest.raises(ModelError, match="radt train recognizer-emoji --out"):
            EmojiRecognizer.load()
        assert find_recognizer() is None

    def test_the_one_inside_is_found(
        self, recognizer: EmojiRecognizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(emoji_recognizer, "FOLDER", tmp_path / "inside")
        save_recognizer(tmp_path / "inside", recognizer.network, recognizer.classes)
        found = find_recognizer()
        assert found is not None
        assert found.digest == recognizer.digest

    def test_it_lies_apart_from_the_bundle(self) -> None:
        bundle = default_bundle().resolve()
        assert bundle not in emoji_recognizer.FOLDER.resolve().parents
        assert not any("recogni" in path.name for path in bundle.rglob("*"))
        weights = {path.read_bytes() for path in bundle.rglob("*.safetensors")}
        installed = emoji_recognizer.FOLDER / WEIGHTS_FILE
        assert not installed.is_file() or installed.read_bytes() not in weights

    def test_its_classes_are_those_of_the_entities_held_out_ones_too(
        self, recognizer: EmojiRecognizer, glyphs: GlyphRenderer
    ) -> None:
        assert recognizer.classes == tuple(sorted({entity.class_id for entity in ENTITIES}))
        held_out = select(load_entities(), "heldout")[:3]
        source = GlyphPictures([*ENTITIES, *held_out], glyphs, config=TINY)
        assert {entity.class_id for entity in held_out} <= set(source.classes)
        if EmojiRecognizer.is_installed():  # the one that ships knows every class
            classes = json.loads((emoji_recognizer.FOLDER / CONFIG_FILE).read_text())["classes"]
            assert set(classes) == {entity.class_id for entity in load_entities()}


class TestUse:
    def test_many_at_once_are_each_alone_and_none_is_none(
        self, recognizer: EmojiRecognizer, pictures: np.ndarray
    ) -> None:
        together = recognizer.logits(pictures)
        alone = np.concatenate([recognizer.logits(picture[None]) for picture in pictures])
        assert together.dtype == np.float32
        assert together == pytest.approx(alone, abs=1e-4)
        assert recognizer.logits(pictures[:0]).shape == (0, len(recognizer.classes))
        assert recognizer.features(pictures[:0]).shape == (0, 24)
        assert recognizer.features(pictures).shape == (len(pictures), 24)

    def test_it_does_not_depend_on_the_size_of_a_plain_picture(self, recognizer: EmojiRecognizer) -> None:
        plain = [np.full((1, side, side, 3), PALETTE["red"], np.uint8) for side in (16, 32, 100)]
        first, *others = (recognizer.features(picture) for picture in plain)
        assert all(other == pytest.approx(first, abs=1e-4) for other in others)

    def test_a_picture_of_its_size_is_taken_as_it_is(self) -> None:
        picture = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
        back = ((to_frame(picture, 16) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(back, picture)

    def test_a_crop_on_whole_pixels_is_that_part_and_edges_go_on(self) -> None:
        picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        assert np.array_equal(crop_box(picture, (0.25, 0.5, 0.75, 1.0), 4), picture[4:8, 2:6])
        beyond = crop_box(picture, (-0.5, 0.0, 0.5, 1.0), 8)
        assert np.array_equal(beyond[:, 4:], picture[:, :4])
        assert (beyond[:, :4] == picture[:, :1]).all()
