"""The tower that is read without open_clip agrees with open_clip's, and takes nothing that it may mistake."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from index.errors import ModelError
from radt.bundle import CLIP_FOLDER, default_bundle
from radt.clip_text import read_plain_clip
from radt.text_encoder import CLIP_CONFIG, CLIP_WEIGHTS, ClipTextEncoder
from tests.text_models import save_clip

TEXTS = [
    "a wolf on an orange background",
    "",
    "The Quick  brown\tfox's 42 jumps, (twice)! caf\u00e9 \U0001f408 \u4f60\u597d",
    "fish &amp; chips &amp;lt; tea",
    "<end> marks <pad> of the tokenizer <start>",
    "sch\u00c3\u00b6n",  # UTF-8 that was read as Latin-1
    "a wolf and " * 40,
]
WAYS_OUT = {
    "quick gelu": ({"quick_gelu": True}, {}),
    "a tower of its own class": ({"custom_text": True}, {}),
    "pooled elsewhere": ({}, {"pool_type": "last"}),
    "another tokenizer": ({}, {"hf_tokenizer_name": "roberta-base"}),
    "a field of a later open_clip": ({}, {"ls_init_value": 0.1}),
}


@pytest.fixture
def clip(tmp_path):
    return shutil.copytree(default_bundle() / CLIP_FOLDER, tmp_path / "clip")


def change(folder, model, text):
    path = folder / CLIP_CONFIG
    config = json.loads(path.read_text())
    config["model_cfg"] |= model
    config["model_cfg"]["text_cfg"] |= text
    path.write_text(json.dumps(config))


def test_it_is_open_clips_tower(clip):
    fast, slow = read_plain_clip(clip), ClipTextEncoder.load(clip)
    one, two = fast.encode(TEXTS), slow.encode(TEXTS)
    assert torch.equal(one.mask, two.mask)
    torch.testing.assert_close(one.tokens, two.tokens, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(one.pooled, two.pooled, rtol=1e-5, atol=2e-5)
    assert (fast.width, fast.pooled_width) == (slow.width, slow.pooled_width)
    assert fast.encode([]).tokens.shape == slow.encode([]).tokens.shape


def test_it_tells_what_it_cuts_as_the_other_does(clip):
    fast, slow = read_plain_clip(clip), ClipTextEncoder.load(clip)
    assert fast.truncations([*TEXTS, *TEXTS]) == slow.truncations(TEXTS)
    assert len(fast.truncations(TEXTS)) == 2


@pytest.mark.parametrize(("model", "text"), WAYS_OUT.values(), ids=WAYS_OUT)
def test_what_it_does_not_know_is_left_to_open_clip(clip, model, text):
    change(clip, model, text)
    assert read_plain_clip(clip) is None


def test_open_clips_own_vocabulary_is_left_to_it(tmp_path):
    assert read_plain_clip(save_clip(tmp_path / "clip", own_tokenizer=True)) is None


@pytest.mark.parametrize("name", [CLIP_CONFIG, CLIP_WEIGHTS, "tokenizer.json"])
def test_a_missing_file_is_left_to_open_clips_message(clip, name):
    (clip / name).unlink()
    assert read_plain_clip(clip) is None


def test_damaged_weights_are_one_sentence(clip):
    (clip / CLIP_WEIGHTS).write_bytes((clip / CLIP_WEIGHTS).read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cannot be read .* copy the model again"):
        read_plain_clip(clip)


def test_weights_of_another_size_are_one_sentence(clip):
    change(clip, {}, {"width": 64})
    with pytest.raises(ModelError, match=r"cannot be read .* copy the model again"):
        read_plain_clip(clip)


def test_its_fingerprint_covers_weights_and_tokenizer(clip, tmp_path):
    before = read_plain_clip(clip).fingerprint
    assert read_plain_clip(shutil.copytree(clip, tmp_path / "copy")).fingerprint == before
    tokenizer = json.loads((clip / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (clip / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_plain_clip(clip).fingerprint != before


def test_the_model_inside_is_loaded_without_the_libraries_that_take_seconds():
    script = "import sys; from radt.pipeline import TextToImage; TextToImage.load(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"open_clip", "torchvision", "transformers", "torch._dynamo"} & set(loaded)
