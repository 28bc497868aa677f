"""Conditions as data: dropping, stacking, taking rows and moving follow simple laws and change nothing in place."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from radt.conditioning import (
    Condition,
    NeighborKV,
    TextCondition,
    concatenate,
    map_tensors,
    take_rows,
    to_device,
)
from tests.networks import random_neighbors, random_text

B, K = 3, 2


def some_kv(seed: int = 0) -> NeighborKV:
    g = torch.Generator().manual_seed(seed)
    levels = tuple(torch.randn(B, 2, m, 8, generator=g) for m in (17, 5))
    return NeighborKV(
        keys=levels,
        values=tuple(-level for level in levels),
        captions=torch.randn(B, K, 5, 4, generator=g),
        caption_mask=torch.rand(B, K, 5, generator=g) < 0.8,
        mask=torch.tensor([[True, True], [True, False], [False, False]]),
    )


TEXT = random_text(B)
CONDITION = Condition(text=TEXT, neighbors=some_kv())
RECORDS = [TEXT, random_neighbors(B, K), some_kv(), CONDITION, CONDITION.without_neighbors()]


def tensors_of(record: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, record)
    return found


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    for first, second in zip(tensors_of(one), tensors_of(two), strict=True):
        assert torch.equal(first, second)


def rows(record: Any, start: int, stop: int) -> Any:
    return map_tensors(lambda tensor: tensor[start:stop], record)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_stacking_keeps_every_row(record: Any) -> None:
    stacked = concatenate([record, rows(record, 1, 2), record])
    assert_same(rows(stacked, 0, B), record)
    assert_same(rows(stacked, B, B + 1), rows(record, 1, 2))
    assert_same(rows(stacked, B + 1, 2 * B + 1), record)
    assert_same(concatenate([record]), record)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_row_that_is_taken_again_is_a_copy_beside_it(record: Any) -> None:
    thrice = take_rows(record, [i for i in range(B) for _ in range(3)])
    for i in range(B):
        for copy in range(3):
            assert_same(rows(thrice, 3 * i + copy, 3 * i + copy + 1), rows(record, i, i + 1))
    assert_same(take_rows(record, range(B)), record)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_tensor_moves(record: Any) -> None:
    moved = tensors_of(to_device(record, "meta"))
    assert moved
    assert all(tensor.device.type == "meta" for tensor in moved)
    assert [t.shape for t in moved] == [t.shape for t in tensors_of(record)]


def test_branches_with_and_without_neighbors_do_not_stack() -> None:
    """Silently losing the neighbours of one of them would be worse."""
    without = CONDITION.without_neighbors()
    for mixed in ([CONDITION, without], [without, CONDITION]):
        with pytest.raises((AssertionError, AttributeError), match=r"neighbors|NoneType"):
            concatenate(mixed)


@pytest.mark.parametrize("record", [TEXT, some_kv(), random_text(B, K)], ids=["text", "neighbors", "captions"])
def test_dropping_masks_the_rows_named_and_no_other(record: TextCondition | NeighborKV) -> None:
    where = torch.zeros(record.mask.shape[:-1], dtype=torch.bool)
    where[1] = True
    dropped = record.drop(where)
    assert not dropped.mask[1].any()
    for i in (0, 2):
        assert_same(rows(dropped, i, i + 1), rows(record, i, i + 1))
    assert_same(dropped.drop(where), dropped)
    assert_same(dataclasses.replace(dropped, mask=record.mask), record)  # nothing but the mask
    assert_same(record.drop(torch.zeros_like(where)), record)
    assert not record.drop(torch.ones_like(where)).mask.any()


def test_the_nulls_of_guidance() -> None:
    before = map_tensors(torch.clone, CONDITION)
    c_n, c_p = CONDITION.drop_text(), CONDITION.drop_neighbors()
    assert c_n.neighbors is CONDITION.neighbors
    assert c_p.text is TEXT
    assert not c_n.text.mask.any()
    assert c_p.neighbors is not None
    assert not c_p.neighbors.mask.any()
    assert_same(c_n.drop_neighbors(), c_p.drop_text())
    assert concatenate([CONDITION, c_n, c_p]).batch_size == 3 * B
    assert_same(CONDITION, before)


def test_without_neighbors_there_is_nothing_to_drop() -> None:
    without = CONDITION.without_neighbors()
    assert without.neighbors is None
    assert without.drop_neighbors() is without
    assert without.batch_size == CONDITION.batch_size == B
