"""Fixtures for all tests: a real open_clip model, tiny and with random weights, as a folder."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

# Check the shapes and types of every signature while testing, before any module of ours is imported. Ints pass for
# floats, as PEP 484 has it.
jaxtyping.install_import_hook(("radt", "index"), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def pytest_configure() -> None:
    """Hear Ctrl-C even where the tests run in the background, whose children would inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """Save a model in open_clip's `local-dir:` form."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**TINY_CLIP)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": {}}))
    return folder


@pytest.fixture
def untyped_caller() -> Iterator[None]:
    """Let wrong types through to our own checks, as they come from a user's untyped code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that `--model` and ClipEmbedder take."""
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with other weights."""
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "other-clip", seed=1)
