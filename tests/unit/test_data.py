"""Batches: a function of the generator alone, and every kind of noise does what its name says, and nothing else."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from index.errors import ConfigError
from radt.conditioning import map_tensors
from radt.neighbors import to_pixels
from radt.training.data import Batch, DataConfig, draw_batch
from radt.training.pack import Pack
from tests.networks import generator
from tests.packs import CANDIDATES, NUM_PICTURES, NUM_SCENES, small_pack

QUIET = DataConfig(
    batch_size=64,
    wrong_prob=0,
    missing_prob=0,
    drop_text_prob=0,
    drop_neighbors_prob=0,
    recolor_prob=0,
    mirror_prob=0,
)
ORDERS = list(itertools.permutations(range(3)))
USUAL = (0, 1, 2)


@pytest.fixture(scope="module")
def pack() -> Pack:
    return small_pack()


def tensors_of(record: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, record)
    return found


def draw(pack: Pack, seed: int = 0, **changes: Any) -> Batch:
    return draw_batch(pack, dataclasses.replace(QUIET, **changes), generator(seed))


def scene_pixels(pack: Pack, scene: int, order: tuple[int, ...] = USUAL) -> Tensor:
    """The entity, its channels in this order, over its ground, whose channels stay."""
    layer = pack.layers[pack.scene_layer[scene]].float()
    ground = pack.scene_ground[scene].float()
    return to_pixels(layer[..., list(order)] + ground * (1 - layer[..., 3:] / 255))


def recognize(pixels: Tensor, candidates: dict[Any, Tensor]) -> list[Any]:
    """Which candidates a picture is."""
    return [name for name, candidate in candidates.items() if (pixels - candidate).abs().max() < 1e-5]


def recognize_scenes(pack: Pack, batch: Batch) -> list[int]:
    scenes = {i: scene_pixels(pack, i) for i in range(NUM_SCENES)}
    found = [recognize(x, scenes) for x in batch.x0]
    assert all(len(names) == 1 for names in found)
    return [names[0] for names in found]


def recognize_pictures(pack: Pack, batch: Batch) -> list[list[int]]:
    pictures = {i: to_pixels(picture) for i, picture in enumerate(pack.pictures)}
    return [[recognize(pixels, pictures)[0] for pixels in row] for row in batch.neighbors.pixels]


def test_same_generator_same_batch(pack: Pack) -> None:
    one, two = (draw_batch(pack, DataConfig(batch_size=8), generator(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(two), strict=True))
    torch.manual_seed(123)  # not of it
    three = draw_batch(pack, DataConfig(batch_size=8), generator(3))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(three), strict=True))
    assert not torch.equal(one.x0, draw_batch(pack, DataConfig(batch_size=8), generator(4)).x0)


def test_without_noise_a_batch_is_what_the_pack_holds(pack: Pack) -> None:
    batch = draw(pack)
    assert batch.x0.abs().max() <= 1
    scenes, pictures = recognize_scenes(pack, batch), recognize_pictures(pack, batch)
    assert len(set(scenes)) > NUM_SCENES / 2
    text = pack.scene_text.gather(torch.tensor(scenes))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(batch.text), tensors_of(text), strict=True))
    for i, (scene, shown) in enumerate(zip(scenes, pictures, strict=True)):
        best = pack.scene_neighbors[scene, : QUIET.candidates].tolist()
        for place, picture in enumerate(shown):
            if batch.neighbors.mask[i, place]:
                assert picture in best
        if scene not in (5, 6):
            assert batch.neighbors.mask[i].all()
            assert len(set(shown)) == QUIET.num_neighbors  # never the same one twice
        if scene == 6:
            assert not batch.neighbors.mask[i].any()
    captions = pack.picture_text.gather(torch.tensor(pictures))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(batch.neighbors.text), tensors_of(captions), strict=True))


def test_best_candidates_come_in_every_order(pack: Pack) -> None:
    batch = draw(pack, batch_size=400)
    scenes, pictures = recognize_scenes(pack, batch), recognize_pictures(pack, batch)
    places = [
        pack.scene_neighbors[scene].tolist().index(shown[0])
        for scene, shown in zip(scenes, pictures, strict=True)
        if scene not in (5, 6)
    ]
    counts = [places.count(place) for place in range(CANDIDATES)]
    assert counts[QUIET.candidates :] == [0]
    assert min(counts[: QUIET.candidates]) > 80  # of some 367, a third each


def test_wrong_neighbors_come_from_the_whole_pack(pack: Pack) -> None:
    batch = draw(pack, batch_size=200, wrong_prob=1)
    assert batch.neighbors.mask.all()
    pictures = recognize_pictures(pack, batch)
    assert {picture for row in pictures for picture in row} == set(range(NUM_PICTURES))
    captions = pack.picture_text.gather(torch.tensor(pictures))
    assert torch.equal(batch.neighbors.text.tokens, captions.tokens)  # with their own captions, so that it can be seen
    recognize_scenes(pack, batch)  # and the scenes are as ever


@pytest.mark.parametrize("name", ["missing_prob", "drop_neighbors_prob"])
def test_without_neighbors(pack: Pack, name: str) -> None:
    batch = draw(pack, **{name: 1})
    assert not batch.neighbors.mask.any()
    assert batch.text.mask.any(dim=1).all()


def test_without_text(pack: Pack) -> None:
    batch = draw(pack, drop_text_prob=1)
    assert not batch.text.mask.any()
    assert batch.neighbors.mask.any()
    assert batch.neighbors.text.mask.any(dim=-1).all()  # the neighbours' captions stay


def test_rates(pack: Pack) -> None:
    n = 4000
    batch = draw(pack, batch_size=n, missing_prob=0.3, drop_text_prob=0.2)
    usual = torch.tensor([not torch.allclose(x, scene_pixels(pack, 6)) for x in batch.x0])
    assert abs((~batch.text.mask.any(dim=1)).float().mean() - 0.2) < 4 * (0.16 / n) ** 0.5
    missing = (~batch.neighbors.mask[usual]).float().mean(dim=0)
    few = 2 / 3 * 1 / NUM_SCENES  # scene 5 has two candidates of three
    assert (missing - 0.3 - few).abs().max() < 0.05
    together = draw(pack, batch_size=n, drop_neighbors_prob=0.25).neighbors.mask[usual]
    assert not (together[:, 0] ^ together[:, 1]).float().mean() > 0.05  # all of an example at once
    alone = draw(pack, batch_size=n, drop_text_prob=0.5, drop_neighbors_prob=0.5)
    both = (~alone.text.mask.any(dim=1) & ~alone.neighbors.mask.any(dim=1)).float().mean()
    assert abs(both - 0.25) < 0.06  # the two are independent


def test_recoloring_turns_entity_and_neighbors_alike_and_leaves_the_ground(pack: Pack) -> None:
    batch = draw(pack, batch_size=100, recolor_prob=1)
    candidates = {(i, order): scene_pixels(pack, i, order) for i in range(NUM_SCENES) for order in ORDERS}
    pictures = {
        (i, order): to_pixels(picture[..., list(order)]) for i, picture in enumerate(pack.pictures) for order in ORDERS
    }
    seen = set()
    for i, x in enumerate(batch.x0):
        ((_, order),) = recognize(x, candidates)
        seen.add(order)
        for pixels in batch.neighbors.pixels[i]:
            ((_, its_order),) = recognize(pixels, pictures)
            assert its_order == order
    assert seen == set(ORDERS)


def test_mirroring_turns_entity_and_neighbors_alike_where_the_caption_allows(pack: Pack) -> None:
    batch = draw(pack, batch_size=60, mirror_prob=1)
    scenes = {
        (i, mirrored): scene_pixels(pack, i).flip(-1) if mirrored else scene_pixels(pack, i)
        for i in range(NUM_SCENES)
        for mirrored in (False, True)
    }
    pictures = [to_pixels(picture) for picture in pack.pictures]
    sides = {False: pictures, True: [picture.flip(-1) for picture in pictures]}
    seen = set()
    for i, x in enumerate(batch.x0):
        ((scene, mirrored),) = recognize(x, scenes)
        assert mirrored == bool(pack.scene_mirrors[scene])
        seen.add(mirrored)
        for pixels in batch.neighbors.pixels[i]:
            assert recognize(pixels, dict(enumerate(sides[mirrored])))
    assert seen == {False, True}


def test_any_number_of_neighbors(pack: Pack) -> None:
    batch = draw(pack, num_neighbors=4, candidates=4)
    assert batch.neighbors.mask.shape[1] == 4
    assert draw(pack, num_neighbors=1, candidates=1).neighbors.mask.shape[1] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_neighbors": 4}, "num_neighbors 4 must be at most candidates 3"),
        ({"num_neighbors": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"wrong_prob": 1.5}, "wrong_prob is a probability from 0 to 1, got 1.5"),
        ({"drop_text_prob": -0.1}, "drop_text_prob is a probability"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**changes)
    assert said in str(caught.value)
