"""`radt train tiny` from end to end: corpus, knowledge base, pack, training, and a bundle that loads and draws."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from index.errors import ConfigError, CorpusError, ModelError
from index.knowledge_base import KnowledgeBase
from radt.bundle import load_bundle
from radt.corpora.emoji import load_entities, select
from radt.neighbors import Reference
from radt.pipeline import TextToImage
from radt.presets import tiny
from radt.provenance import replay
from radt.text_encoder import TransformersTextEncoder
from radt.training.checkpoint import CheckpointError
from radt.training.emoji_pack import check_no_leak
from radt.training.pack import Pack
from radt.training.run import train
from tests.conftest import TINY_CLIP
from tests.integration.conftest import tiny_run
from tests.text_models import save_t5

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

NUM_ENTITIES, STEPS = 6, 6
ROOT = Path(__file__).parents[2]


def settings(clip: Path, *more: str) -> list[str]:
    return [
        *tiny_run(clip, entities=NUM_ENTITIES, steps=STEPS),
        "loop.save_every=3",
        "sampling.decompose=phrases",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("run") / "base"
    stages: list[str] = []
    bundle = train("tiny", settings(tiny_clip), out, on_stage=stages.append)
    assert bundle == out / "bundle"
    assert stages == [
        "drawing the corpus of training entities",
        "building its knowledge base",
        "drawing scenes",
        "looking neighbours up",
        "embedding captions",
        "training",
    ]
    return out


@pytest.fixture
def prepared(finished: Path, tmp_path: Path) -> Path:
    """A new run whose pack is there already."""
    shutil.copy(finished / "pack.safetensors", tmp_path / "pack.safetensors")
    return tmp_path


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = load_file(one / "state.safetensors"), load_file(two / "state.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    promised = ["bundle", "captions.json", "config.json", "corpus", "kb", "metrics.jsonl", "pack.safetensors"]
    assert sorted(path.name for path in finished.iterdir()) == [
        *promised,
        "probe.jsonl",
        "samples",
        "state.safetensors",
    ]
    assert [path.name for path in sorted((finished / "samples").iterdir())] == ["0000003.png", "0000006.png"]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_the_bundle_loads_with_the_averaged_weights(finished: Path, tiny_clip: Path) -> None:
    bundle = load_bundle(finished / "bundle")
    assert (bundle.info.name, bundle.info.sampling) == ("tiny", replace(tiny().sampling, decompose="phrases"))
    assert (bundle.info.stages[0].prediction, bundle.info.stages[0].schedule.curve) == ("v", "cosine")
    state = load_file(finished / "state.safetensors")
    for name, weight in bundle.unets[0].state_dict().items():
        assert torch.equal(weight, state[f"ema/{name}"])
    assert bundle.text_encoder.encode(["a wolf"]).pooled.shape == (1, TINY_CLIP["embed_dim"])


def test_the_bundle_draws_from_a_neighbor(finished: Path) -> None:
    reference = Reference(image=Image.new("RGB", (32, 32), "red"), caption="a wolf")
    image = TextToImage.load(finished / "bundle")("a wolf on a red background", references=[reference], seed=3)
    assert image


def test_the_pack_shows_training_entities_and_never_the_picture_itself(finished: Path) -> None:
    pack = Pack.load(finished / "pack.safetensors")
    assert len(pack) == 12
    kb = KnowledgeBase.open(finished / "kb")
    pairs = kb.store.get(kb.store.matching_ids())
    training = {" ".join(entity.codes) for entity in select(load_entities(), "train")}
    shown = {pair.metadata["codes"] for pair in pairs}
    assert len(shown) == NUM_ENTITIES
    assert shown <= training
    assert len(pack.pictures) <= len(pairs)
    assert pack.scene_neighbors.max() == len(pack.pictures) - 1
    for row in pack.scene_neighbors:
        present = row[row >= 0].tolist()
        assert len(set(present)) == len(present) > 0


def test_a_pack_is_a_function_of_its_configuration(finished: Path, tiny_clip: Path) -> None:
    from radt.text_encoder import ClipTextEncoder
    from radt.training.emoji_pack import PackConfig, make_emoji_pack

    kb = KnowledgeBase.open(finished / "kb")
    encoder = ClipTextEncoder.load(tiny_clip)
    config = PackConfig(num_scenes=12, num_entities=NUM_ENTITIES)
    make_emoji_pack(config, image_size=32, kb=kb, text_encoder=encoder).save(finished.parent / "again", {})
    one, two = load_file(finished / "pack.safetensors"), load_file(finished.parent / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_held_out_entity_in_the_knowledge_base_is_refused(finished: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Even one, even as a picture that no caption asks for by name."""
    import numpy as np
    from PIL import Image

    from radt.corpora.emoji import GlyphRenderer, render_rendition, rendition
    from radt.text_encoder import ClipTextEncoder
    from radt.training.emoji_pack import PackConfig, make_emoji_pack

    shutil.copytree(finished / "kb", tmp_path / "kb")
    kb = KnowledgeBase.open(tmp_path / "kb")
    secret, known = select(load_entities(), "heldout")[0], select(load_entities(), "train")[0]
    picture = Image.fromarray(np.asarray(render_rendition(GlyphRenderer().glyph(secret), rendition(secret, 1), 32)))
    facts = secret.facts() | {"rendition": 1}
    kb.add([picture], known.caption, dataset="emoji", metadata=facts)
    kb.build_search("exact", duplicates=False)  # an untrained model finds all pictures alike
    with pytest.raises(CorpusError, match="shows a held-out entity: train from a knowledge base of"):
        make_emoji_pack(
            PackConfig(num_scenes=40, num_entities=NUM_ENTITIES, by="bm25"),
            image_size=32,
            kb=kb,
            text_encoder=ClipTextEncoder.load(tiny_clip),
        )
    hits = [kb.search(known.caption, k=8, by="bm25")]
    with pytest.raises(CorpusError):
        check_no_leak(hits, load_entities())
    check_no_leak([[hit for hit in hits[0] if hit.metadata["codes"] != facts["codes"]]], load_entities())


def test_an_interrupted_run_resumes_to_the_same_bits(finished: Path, prepared: Path, tiny_clip: Path) -> None:
    def press_ctrl_c(line: dict[str, float]) -> None:
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train("tiny", settings(tiny_clip), prepared, on_step=press_ctrl_c)
    assert (prepared / "state.safetensors").exists()
    assert not (prepared / "bundle").exists()
    train("tiny", settings(tiny_clip), prepared)
    assert_same_weights(finished, prepared)
    for name in ("bundle/stage0/model.safetensors", "bundle/bundle.json", "samples/0000006.png"):
        assert (finished / name).read_bytes() == (prepared / name).read_bytes()


def test_the_same_command_again_trains_no_further_and_renews_the_bundle(
    finished: Path, prepared: Path, tiny_clip: Path
) -> None:
    shutil.copy(finished / "state.safetensors", prepared / "state.safetensors")
    steps: list[dict[str, float]] = []
    train("tiny", settings(tiny_clip), prepared, on_step=steps.append)
    assert steps == []
    assert_same_weights(finished, prepared)
    assert (prepared / "bundle" / "bundle.json").read_bytes() == (finished / "bundle" / "bundle.json").read_bytes()


def test_another_configuration_is_refused(finished: Path, tiny_clip: Path) -> None:
    before = (finished / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"was started with another data.wrong_prob, optim.lr; choose another --out"):
        train("tiny", settings(tiny_clip, "optim.lr=0.1", "data.wrong_prob=0.5"), finished)
    assert (finished / "config.json").read_bytes() == before


def test_training_may_start_from_a_stage_that_was_trained_before(
    finished: Path, prepared: Path, tiny_clip: Path
) -> None:
    stage = finished / "bundle" / "stage0"
    asked = settings(tiny_clip, f"start={stage}", "loop.num_steps=1", "optim.lr=1e-9", "optim.warmup_steps=0")
    train("tiny", asked, prepared)
    trained, started = (
        load_file(prepared / "bundle" / "stage0" / "model.safetensors"),
        load_file(stage / "model.safetensors"),
    )
    assert all(torch.allclose(trained[name], started[name], rtol=1e-3, atol=1e-6) for name in started)
    with pytest.raises(ConfigError, match="is another network than unet asks for"):
        train("tiny", settings(tiny_clip, f"start={stage}", "unet.heads=4"), prepared / "new")
    with pytest.raises(ModelError, match="nowhere"):
        train("tiny", settings(tiny_clip, "start=nowhere"), prepared / "newer")
    gone = [each.replace(str(stage), "gone") for each in asked]
    train("tiny", [*gone, "loop.num_steps=2"], prepared)  # it has weights of its own now


def test_training_may_start_from_a_stage_without_a_refiner(finished: Path, prepared: Path, tiny_clip: Path) -> None:
    stage = finished / "bundle" / "stage0"
    more = ("unet.text_layers=1", "loop.num_steps=1", "optim.lr=1e-9", "optim.warmup_steps=0")
    train("tiny", settings(tiny_clip, f"start={stage}", *more), prepared)
    trained, started = (
        load_file(prepared / "bundle" / "stage0" / "model.safetensors"),
        load_file(stage / "model.safetensors"),
    )
    assert all(torch.allclose(trained[name], started[name], rtol=1e-3, atol=1e-6) for name in started)
    assert {name.partition(".")[0] for name in trained.keys() - started.keys()} == {"refiner"}
    # What was trained is not thrown away.
    lost = settings(tiny_clip, f"start={prepared / 'bundle' / 'stage0'}", "unet.text_layers=0")
    with pytest.raises(ConfigError, match="is another network than unet asks for"):
        train("tiny", lost, prepared / "new")


def test_t5_can_read_the_prompts(tiny_clip: Path, tmp_path: Path) -> None:
    t5 = save_t5(tmp_path / "t5")
    widths = ["unet.text_width=16", "unet.pooled_width=16"]
    bundle = train("tiny", settings(tiny_clip, f"text_encoder={t5}", *widths), tmp_path / "base")
    shutil.rmtree(t5)  # the bundle has its own
    loaded = load_bundle(bundle)
    assert isinstance(loaded.text_encoder, TransformersTextEncoder)
    assert loaded.info.text_encoder == "text"
    reference = Reference(image=Image.new("RGB", (32, 32), "red"), caption="a red fox")
    pictures = TextToImage.load(bundle)("two foxes", k=1, steps=2, references=[reference])
    assert pictures[0].save(tmp_path / "fox.png").exists()
    assert replay(tmp_path / "fox.png", bundle).identical


def test_a_pack_of_another_clip_is_refused(finished: Path, tiny_clip: Path, other_clip: Path) -> None:
    with pytest.raises(ConfigError, match=r"was made with another CLIP than .*delete the pack"):
        train("tiny", settings(other_clip), finished)
    train("tiny", settings(tiny_clip), finished)


def test_a_run_may_log_more_and_go_on_longer(finished: Path, prepared: Path, tiny_clip: Path) -> None:
    for name in ("state.safetensors", "config.json"):
        shutil.copy(finished / name, prepared / name)
    seen: list[float] = []
    longer = settings(tiny_clip, "loop.num_steps=8", "loop.log_every=2", "sampling.steps=2")
    train("tiny", longer, prepared, on_step=lambda line: seen.append(line["step"]))
    assert seen == [7, 8]


def test_a_run_of_an_older_version_goes_on(finished: Path, prepared: Path, tiny_clip: Path) -> None:
    """A field that did not exist then has its default."""
    config = json.loads((finished / "config.json").read_text())
    del config["data"]["mirror_prob"], config["pack"]["by"]
    (prepared / "config.json").write_text(json.dumps(config))
    train("tiny", settings(tiny_clip), prepared)
    assert_same_weights(finished, prepared)


def test_mistakes_are_one_sentence(finished: Path, prepared: Path, tiny_clip: Path) -> None:
    with pytest.raises(ConfigError, match="unknown preset 'huge'; choose one of emoji-demo"):
        train("huge", [], prepared)
    with pytest.raises(ModelError, match="there is no CLIP folder 'nowhere'; make it with"):
        train("tiny", ["clip=nowhere"], prepared / "new")
    with pytest.raises(ConfigError, match="the pack holds text tokens of width 16 and the network takes 24"):
        train("tiny", settings(tiny_clip, "unet.text_width=24"), prepared)
    with pytest.raises(
        ConfigError, match="pictures are 32x32 and the network draws 32x64: change unet, or bring a pack"
    ):
        train("tiny", settings(tiny_clip, "unet.image_width=64"), prepared / "new")
    assert list((prepared / "new").iterdir()) == [prepared / "new" / "config.json"]  # of the one above
    with pytest.raises(ConfigError, match=r"data asks for 7 candidates a scene .* the pack holds 6"):
        train("tiny", settings(tiny_clip, "data.num_neighbors=[2, 7]"), prepared / "newest")
    (prepared / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not the configuration of such a run"):
        train("tiny", settings(tiny_clip), prepared)


def test_broken_files_of_a_run_are_one_sentence(finished: Path, prepared: Path, tiny_clip: Path) -> None:
    (prepared / "state.safetensors").write_bytes((finished / "state.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="delete it to start this run again"):
        train("tiny", settings(tiny_clip), prepared)
    (prepared / "pack.safetensors").write_bytes(b"")
    with pytest.raises(CorpusError, match="delete it to make it again"):
        train("tiny", settings(tiny_clip), prepared)


BARE = """
import sys
for name in ("lancedb", "lance", "pyarrow", "open_clip", "scann", "sklearn", "transformers"):
    sys.modules[name] = None  # an import of it fails
from pathlib import Path
from radt.training.run import train
train("tiny", sys.argv[2:], Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_from_a_pack_training_needs_neither_index_nor_clip(finished: Path, prepared: Path, tiny_clip: Path) -> None:
    """On a machine with torch and radt alone; at home the same command then makes the bundle."""
    changes = settings(tiny_clip, "clip=not-here")
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(prepared), *changes], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_same_weights(finished, prepared)
    assert not (prepared / "bundle").exists()
    train("tiny", settings(tiny_clip), prepared)
    assert (prepared / "bundle" / "bundle.json").read_bytes() == (finished / "bundle" / "bundle.json").read_bytes()


TOGETHER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.unit.test_loop import make_run
out = Path(sys.argv[1])
run = make_run(out)
run.train()
assert run.accelerator.num_processes == 2
state = {name: tensor.contiguous() for name, tensor in run.network.state_dict().items()}
save_file(state, out / f"rank{run.accelerator.process_index}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """Each draws batches of its own, the gradients are shared, and both end with the same weights."""
    (tmp_path / "together.py").write_text(TOGETHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(tmp_path / "together.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = load_file(tmp_path / "rank0.safetensors"), load_file(tmp_path / "rank1.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    state = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(one[name], state[f"network/{name}"]) for name in one)
    seen = [json.loads(line)["images_seen"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen == [6, 12, 18, 24, 30, 36]
