from dataclasses import replace

import pytest
import torch

from index.errors import ConfigError, CorpusError
from radt.diffusion.schedule import NoiseSchedule
from radt.text_encoder import ClipTextEncoder, TransformersTextEncoder, load_text_encoder
from radt.training.checkpoint import load_state, save_state
from radt.training.data import DataConfig
from radt.training.loop import Objective
from radt.training.optim import OptimConfig
from radt.training.precompute import CaptionRecorder, Captions, report_text
from radt.training.text_tuning import STATE_FILE, LiveText, TextTuner, TextTuning
from tests.networks import random_unet
from tests.packs import NUM_PICTURES, NUM_SCENES, small_pack
from tests.text_models import CONTEXT, save_clip, save_t5

WORDS = ("a red wolf", "two foxes", "a blue wolf on red ground", "foxes on ground")
CAPTIONS = Captions(
    scenes=tuple(WORDS[i % 4] for i in range(NUM_SCENES)), pictures=tuple(WORDS[i % 3] for i in range(NUM_PICTURES))
)


@pytest.fixture(params=["clip", "t5"])
def encoder(request, tmp_path):
    if request.param == "clip":
        return ClipTextEncoder.load(save_clip(tmp_path / "clip"))
    return TransformersTextEncoder.load(save_t5(tmp_path / "t5"), max_length=CONTEXT)


def make_tuner(encoder, *, seed=1, **changes):
    optim = OptimConfig(lr=5e-3, warmup_steps=0, weight_decay=0.0)
    return TextTuner(
        encoder,
        random_unet(seed, text_width=encoder.width, pooled_width=encoder.pooled_width).requires_grad_(False),
        small_pack(),
        CAPTIONS,
        objective=Objective(schedule=NoiseSchedule(curve="cosine")),
        data=DataConfig(batch_size=3),
        tuning=TextTuning(num_steps=4, optim=optim, save_every=2, log_every=1, **changes),
    )


def test_live_rows_are_the_encoders_own(encoder):
    live = LiveText.of(small_pack().scene_text, CAPTIONS.scenes, encoder)
    for rows in (torch.tensor([3, 0, 3]), torch.tensor([[1, 2], [5, 4]])):
        found = live.gather(rows)
        wanted = encoder.encode([CAPTIONS.scenes[row] for row in rows.flatten().tolist()])
        assert found.tokens.shape[: rows.ndim] == rows.shape
        assert torch.equal(found.tokens.flatten(0, rows.ndim - 1), wanted.tokens)
        assert torch.equal(found.mask.flatten(0, rows.ndim - 1), wanted.mask)
        assert torch.equal(found.pooled.flatten(0, rows.ndim - 1), wanted.pooled)


def test_tuning_lowers_the_loss_and_moves_the_text_encoder_alone(encoder, tmp_path):
    tuner = make_tuner(encoder)
    state = encoder._model.state_dict()
    others = {name: each.clone() for name, each in state.items() if name.startswith(("visual.", "logit_"))}
    network = {name: each.clone() for name, each in tuner.network.state_dict().items()}
    before = {name: each.detach().clone() for name, each in tuner.weights.items()}
    with torch.no_grad():
        start = sum(float(tuner.loss(step)) for step in range(4))
    tuner.train(tmp_path)
    with torch.no_grad():
        assert sum(float(tuner.loss(step)) for step in range(4)) < start
    assert any(not torch.equal(each, before[name]) for name, each in tuner.weights.items())
    assert all(torch.equal(each, network[name]) for name, each in tuner.network.state_dict().items())
    now = encoder._model.state_dict()
    assert all(torch.equal(now[name], each) for name, each in others.items())


def test_the_gradient_is_the_slope_of_the_loss(encoder):
    """Slow twin: a small step along the gradient changes the loss by its squared length."""
    tuner = make_tuner(encoder)
    loss = tuner.loss(0)
    loss.backward()
    slopes = {name: each.grad.clone() for name, each in tuner.weights.items() if each.grad is not None}
    length = sum(float((slope**2).sum()) for slope in slopes.values())
    step = 2e-2 / length**0.5
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, slope in slopes.items():
                tuner.weights[name].add_(slope, alpha=sign * step / length**0.5)
            ends.append(float(tuner.loss(0)))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(length**0.5, rel=0.05)


def test_a_run_that_was_killed_resumes_to_the_same_bits(encoder, tmp_path):
    first = {name: each.detach().clone() for name, each in encoder.trainable().items()}
    make_tuner(encoder).train(tmp_path / "whole")
    whole = {name: each.detach().clone() for name, each in encoder.trainable().items()}

    def put_back():
        with torch.no_grad():
            for name, each in encoder.trainable().items():
                each.copy_(first[name])

    put_back()

    def kill(metrics):
        if metrics["step"] == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make_tuner(encoder).train(tmp_path / "cut", on_step=kill)
    put_back()
    make_tuner(encoder).train(tmp_path / "cut")
    assert all(torch.equal(each, whole[name]) for name, each in encoder.trainable().items())
    assert (tmp_path / "cut" / STATE_FILE).exists()
    lines = [(tmp_path / name / "text_tuning.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_what_was_tuned_for_another_network_is_tuned_anew(encoder, tmp_path):
    make_tuner(encoder).train(tmp_path)
    told, steps = [], []
    for seed in (1, 2, 2):
        make_tuner(encoder, seed=seed).train(tmp_path, on_step=steps.append, on_stage=told.append)
    assert told == ["the network was trained further: tuning starts anew"]
    assert [metrics["step"] for metrics in steps] == [1, 2, 3, 4]
    assert len((tmp_path / "text_tuning.jsonl").read_text().splitlines()) == 4


def test_a_state_that_does_not_name_its_network_is_resumed(encoder, tmp_path):
    make_tuner(encoder).train(tmp_path)
    tensors, facts = load_state(tmp_path / STATE_FILE)
    save_state(tmp_path / STATE_FILE, tensors, {"step": facts["step"]})
    make_tuner(encoder, seed=2).train(tmp_path, on_step=pytest.fail)


def test_a_tuned_encoder_is_saved_and_loads_as_it_was(encoder, tmp_path):
    make_tuner(encoder).train(tmp_path)
    encoder.save(tmp_path / "text")
    again = load_text_encoder(tmp_path / "nowhere", tmp_path / "text")
    ours, theirs = encoder.encode(WORDS), again.encode(WORDS)
    if isinstance(again, TransformersTextEncoder):  # its own default length pads further
        theirs = replace(theirs, tokens=theirs.tokens[:, :CONTEXT], mask=theirs.mask[:, :CONTEXT])
    torch.testing.assert_close(ours.tokens[ours.mask], theirs.tokens[theirs.mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-5, atol=1e-5)


def test_settings_that_cannot_be_are_one_sentence():
    with pytest.raises(ConfigError, match=r"text_tuning.num_steps must be 0 \(frozen\) or more, got -1"):
        TextTuning(num_steps=-1)
    with pytest.raises(ConfigError, match=r"text_tuning\.save_every"):
        TextTuning(save_every=0)


def test_captions_are_recorded_in_the_order_of_the_packs_rows(encoder, tmp_path):
    recorder = CaptionRecorder(encoder)
    for texts in (CAPTIONS.scenes[:10], CAPTIONS.scenes[10:], CAPTIONS.pictures):
        assert torch.equal(recorder.encode(texts).tokens, encoder.encode(texts).tokens)
    recorder.captions(NUM_SCENES).save(tmp_path)
    assert Captions.load(tmp_path, small_pack()) == CAPTIONS
    Captions(scenes=("a",), pictures=()).save(tmp_path)
    with pytest.raises(CorpusError, match="is not of the pack"):
        Captions.load(tmp_path, small_pack())
    with pytest.raises(CorpusError, match="missing or damaged"):
        Captions.load(tmp_path / "nowhere", small_pack())


def test_the_report_counts_what_there_is(encoder):
    captions = replace(CAPTIONS, pictures=("two foxes on blue ground and a wolf", *CAPTIONS.pictures[1:]))
    report = report_text(
        small_pack(), captions, encoder, data=DataConfig(batch_size=2, num_neighbors=(1, 2)), num_steps=1000
    )
    assert report.captions == NUM_SCENES + NUM_PICTURES
    assert report.captions_of_a_batch == 2 * 3
    assert report.truncated == 1
    assert report.bytes_as_encoded == 4 * report.captions * (CONTEXT * encoder.width + encoder.pooled_width)
    assert report.to_json()["saved_seconds"] == round(report.saved_seconds, 1)
    assert "1 of them were longer" in report.sentence
