"""The pack: what is saved comes back, text within half a step of eight bits, and nothing else is taken for one."""

import dataclasses
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from index.errors import CorpusError, UserError
from radt.conditioning import TextCondition, map_tensors
from radt.training.pack import Pack, TextTable
from tests.networks import IMAGE_SIZE, generator, random_text
from tests.packs import NUM_SCENES, small_pack


def tensors_of(record: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, record)
    return found


def test_round_trip(tmp_path: Path) -> None:
    pack = small_pack()
    pack.save(tmp_path / "pack.safetensors", {"config": "{}"})
    again = Pack.load(tmp_path / "pack.safetensors")
    for before, after in zip(tensors_of(pack), tensors_of(again), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    with safe_open(tmp_path / "pack.safetensors", framework="pt") as file:
        assert file.metadata()["config"] == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["pack.safetensors"]
    assert (len(again), again.size) == (NUM_SCENES, (IMAGE_SIZE, IMAGE_SIZE))


def test_a_pack_is_compressed(tmp_path: Path) -> None:
    pack = dataclasses.replace(small_pack(), pictures=torch.zeros(100, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8))
    pack.save(tmp_path / "pack.safetensors", {})
    assert (tmp_path / "pack.safetensors").stat().st_size < pack.pictures.numel()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.05, 1.0, 30.0, 5000.0])
def test_eight_bit_text_errs_by_half_a_step(scale: float) -> None:
    text = random_text(40, seed=3)
    tokens = text.tokens * scale * 10 ** torch.randn(40, 5, 1, generator=generator(4)).clamp(-2, 1)
    text = dataclasses.replace(text, tokens=tokens)
    table = TextTable.from_conditions([text])
    back = table.gather(torch.arange(40))
    assert torch.equal(back.mask, text.mask)
    error = (back.tokens - text.tokens).abs().amax(dim=-1)[text.mask]
    steps = table.scales.float()
    assert steps.isfinite().all()
    assert (error <= steps / 2 * (1 + 1e-5)).all()
    # And a step is as fine as it can be: the largest number of a token uses all bits.
    largest = text.tokens.abs().amax(dim=-1)[text.mask]
    assert (steps <= (largest / 127 * 1.001).clamp(min=2.0**-14)).all()


def test_gather_pads_with_nothing_and_keeps_the_order_of_rows() -> None:
    texts = [random_text(3, seed=1), random_text(2, seed=2, num_tokens=8)]
    table = TextTable.from_conditions(texts)
    assert len(table) == 5
    rows = torch.tensor([[4, 0], [2, 2]])
    found = table.gather(rows)
    assert found.tokens.shape[:2] == found.pooled.shape[:2] == (2, 2)
    alone = table.gather(torch.tensor([4]))
    n = alone.tokens.shape[1]
    assert torch.equal(found.tokens[0, 0, :n], alone.tokens[0])
    assert not found.tokens[~found.mask].any()
    assert torch.equal(found.mask.sum(dim=-1), torch.tensor([[6, 5], [3, 3]]))
    torch.testing.assert_close(found.pooled[0, 0], texts[1].pooled[1], atol=0, rtol=2**-10)


def test_a_row_of_the_table_does_not_depend_on_the_others() -> None:
    table = TextTable.from_conditions([random_text(9, seed=1)])
    together = table.gather(torch.arange(9))
    for i in range(9):
        alone: TextCondition = table.gather(torch.tensor([i]))
        n = alone.tokens.shape[1]
        assert torch.equal(together.tokens[i, :n], alone.tokens[0])
        assert torch.equal(together.mask[i, :n], alone.mask[0])


def wrong_files(folder: Path) -> Iterator[tuple[str, str]]:
    (folder / "text").write_text("a pack of lies")
    yield "text", "is not a training pack"
    (folder / "empty").touch()
    yield "empty", "is not a training pack"
    yield "absent", "is not a training pack"
    small_pack().save(folder / "whole", {})
    whole = (folder / "whole").read_bytes()
    (folder / "cut").write_bytes(whole[: len(whole) // 2])
    yield "cut", "is not a training pack"
    save_file({"x": torch.zeros(2)}, folder / "weights")
    yield "weights", "has pack format None, not 3"
    tensors = load_file(folder / "whole")
    with safe_open(folder / "whole", framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / "newer", metadata={**metadata, "format": "4"})
    yield "newer", "has pack format 4, not 3"
    save_file({n: t for n, t in tensors.items() if n != "pictures"}, folder / "part", metadata=metadata)
    yield "part", "is a damaged training pack"
    save_file(tensors | {"layers": tensors["layers"].flip(0)}, folder / "garbled", metadata=metadata)
    yield "garbled", "is a damaged training pack"
    save_file(tensors | {"more": torch.zeros(1)}, folder / "more", metadata=metadata)
    yield "more", "is a damaged training pack"


def test_what_is_not_a_pack_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for name, said in wrong_files(tmp_path):
        with pytest.raises(CorpusError) as caught:
            Pack.load(tmp_path / name)
        assert said in str(caught.value), name
        assert str(tmp_path / name) in str(caught.value)
        assert "delete it to make it again" in str(caught.value)


@pytest.fixture
def _full_disk() -> Iterator[None]:
    """Files may not grow beyond a kilobyte."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_is_one_sentence_and_leaves_the_old_pack(tmp_path: Path) -> None:
    (tmp_path / "pack.safetensors").write_text("old")
    with pytest.raises(UserError, match=r"could not write .*make room"):
        small_pack().save(tmp_path / "pack.safetensors", {})
    assert [path.name for path in tmp_path.iterdir()] == ["pack.safetensors"]
    assert (tmp_path / "pack.safetensors").read_text() == "old"


def test_moves_whole() -> None:
    assert {tensor.device.type for tensor in tensors_of(small_pack().to("meta"))} == {"meta"}
