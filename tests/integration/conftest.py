"""A whole model with random weights, small enough for tests, and a knowledge base made with its encoder."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_CLIP
from tests.fakes import caption_of, draw
from tests.shell import Shell

NUM_PAIRS = 12


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tiny_clip: Path) -> Shell:
    """The commands, with a small model as their own."""
    return Shell(capsys, str(tiny_clip))


def save_tiny_bundle(folder: Path, clip: Path, *, seed: int = 0, image_size: int = 8) -> Path:
    """A bundle whose network does something: what starts at zero for training is random here."""
    import torch

    from radt.bundle import StageInfo, write_bundle
    from radt.settings import GenerateSettings
    from radt.text_encoder import ClipTextEncoder
    from radt.unet.unet import UNet, UNetConfig

    encoder = ClipTextEncoder.load(clip)
    config = UNetConfig(
        image_size=image_size,
        text_width=encoder.width,
        pooled_width=encoder.pooled_width,
        channels=(8, 16),
        blocks=(1, 1),
        embedding_width=16,
        attention_levels=(1,),
        encoder_neighbor_levels=(0, 1),
        decoder_neighbor_levels=(0,),
        heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet(config)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    sampling = GenerateSettings(steps=3)
    write_bundle(folder, name="tiny", clip=clip, unets=[unet], stages=[StageInfo(name="stage0")], sampling=sampling)
    return folder


def tiny_run(clip: Path, *, entities: int = 6, scenes: int = 12, steps: int = 2) -> list[str]:
    """What `--set` takes to train the preset `tiny` on the CLIP of the tests, and on little."""
    return [
        f"clip={clip}",
        f"unet.text_width={TINY_CLIP['text_cfg']['width']}",
        f"unet.pooled_width={TINY_CLIP['embed_dim']}",
        f"pack.num_entities={entities}",
        f"pack.num_scenes={scenes}",
        f"loop.num_steps={steps}",
    ]


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for a whole process, and refuses others."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def copy_bundle(bundle: Path, folder: Path, **sampling: Any) -> Path:
    """The same weights with other settings of its own in bundle.json; None leaves a setting out, as an old bundle."""
    shutil.copytree(bundle, folder)
    info = json.loads((folder / "bundle.json").read_text())
    changed = {**info["sampling"], **sampling}
    info["sampling"] = {name: value for name, value in changed.items() if value is not None or name not in sampling}
    (folder / "bundle.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for `--model`."""
    return save_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", tiny_clip)


@pytest.fixture(scope="session")
def phrases_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, which looks up every thing that a prompt names, as the demonstration model does."""
    folder = tmp_path_factory.mktemp("bundles") / "phrases"
    return copy_bundle(tiny_bundle, folder, by="bm25", decompose="phrases")


@pytest.fixture(scope="session")
def tiny_kb(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small pictures with captions, embedded by the bundle's own encoder."""
    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase

    folder = tmp_path_factory.mktemp("bases") / "kb"
    kb = KnowledgeBase.create(folder, ClipEmbedder.load(str(tiny_bundle)))
    for number in range(NUM_PAIRS):
        kb.add([draw(number)], caption_of(number), dataset="shapes", metadata={"license": "CC0"})
    kb.build_search("exact", duplicates=False)  # an untrained model finds all pictures alike
    return folder
