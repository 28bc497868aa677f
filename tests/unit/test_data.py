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
from radt.training.data import JITTER_ANGLE, JITTER_SCALE, Batch, DataConfig, draw_batch
from radt.training.pack import Pack
from tests.networks import IMAGE_SIZE, generator
from tests.packs import CANDIDATES, NUM_PICTURES, NUM_SCENES, small_pack

QUIET = DataConfig(
    batch_size=64,
    num_neighbors=(2,),
    wrong_prob=0,
    missing_prob=0,
    drop_text_prob=0,
    drop_neighbors_prob=0,
    recolor_prob=0,
    invert_prob=0,
    mirror_prob=0,
    turn_prob=0,
    jitter_prob=0,
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
            assert len(set(shown)) == 2  # never the same one twice
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


def test_inverting_turns_entity_and_neighbors_alike_and_leaves_the_ground(pack: Pack) -> None:
    batch = draw(pack, batch_size=100, invert_prob=1)
    choices = list(itertools.product((False, True), repeat=3))

    def inverted(rgb: Tensor, full: Tensor | int, which: tuple[bool, ...]) -> Tensor:
        return torch.where(torch.tensor(which), full - rgb.float(), rgb.float())

    def scene(i: int, which: tuple[bool, ...]) -> Tensor:
        layer, ground = pack.layers[pack.scene_layer[i]].float(), pack.scene_ground[i].float()
        alpha = layer[..., 3:]  # the entity is premultiplied: what is clear stays clear
        return to_pixels(inverted(layer[..., :3], alpha, which) + ground * (1 - alpha / 255))

    scenes = {(i, which): scene(i, which) for i in range(NUM_SCENES) for which in choices}
    pictures = {
        (i, which): to_pixels(inverted(picture, 255, which))
        for i, picture in enumerate(pack.pictures)
        for which in choices
    }
    seen = set()
    for i, x in enumerate(batch.x0):
        ((_, which),) = recognize(x, scenes)
        seen.add(which)
        assert [its for pixels in batch.neighbors.pixels[i] for _, its in recognize(pixels, pictures)] == [which, which]
    assert seen == set(choices)


def test_turning_turns_entity_and_neighbors_alike_where_nothing_stands_in_a_certain_place(pack: Pack) -> None:
    batch = draw(pack, batch_size=100, turn_prob=1)
    scenes = {(i, k): scene_pixels(pack, i).rot90(k, (-2, -1)) for i in range(NUM_SCENES) for k in range(4)}
    pictures = [to_pixels(picture) for picture in pack.pictures]
    seen = set()
    for i, x in enumerate(batch.x0):
        ((scene, quarters),) = recognize(x, scenes)
        assert (quarters > 0) == bool(pack.scene_turns[scene])
        seen.add(quarters)
        for pixels in batch.neighbors.pixels[i]:
            assert recognize(pixels, {j: each.rot90(quarters, (-2, -1)) for j, each in enumerate(pictures)})
    assert seen == {0, 1, 2, 3}


def test_a_wide_picture_is_turned_by_a_half_alone(pack: Pack) -> None:
    half = IMAGE_SIZE // 2
    wide = dataclasses.replace(pack, layers=pack.layers[:, :half], pictures=pack.pictures[:, :half])
    batch = draw(wide, batch_size=60, turn_prob=1)
    scenes = {(i, k): scene_pixels(wide, i).rot90(k, (-2, -1)) for i in range(NUM_SCENES) for k in (0, 2)}
    assert {name[1] for x in batch.x0 for name in recognize(x, scenes)} == {0, 2}


def test_jittered_neighbors_are_moved_each_by_itself_and_their_scene_stays(pack: Pack) -> None:
    smooth = torch.linspace(0, 255, IMAGE_SIZE).to(torch.uint8)
    ramps = torch.stack([smooth[:, None].expand(IMAGE_SIZE, IMAGE_SIZE), smooth.expand(IMAGE_SIZE, IMAGE_SIZE)], dim=-1)
    ramps = torch.cat([ramps, torch.full_like(ramps[..., :1], 90)], dim=-1)  # red tells the row, green the column
    flat = dataclasses.replace(pack, pictures=ramps.expand_as(pack.pictures).clone())
    batch = draw(flat, batch_size=50, jitter_prob=1)
    recognize_scenes(pack, batch)
    moved = batch.neighbors.pixels[..., 4:-4, 4:-4]  # far from the edge a plane stays a plane
    rows, columns = torch.meshgrid(*2 * [torch.arange(moved.shape[-1]).float()], indexing="ij")
    planes = torch.stack([rows.flatten(), columns.flatten(), torch.ones(rows.numel())], dim=1)
    red_green = moved[:, :, :2].flatten(0, 2).flatten(1).T
    fit = torch.linalg.lstsq(planes, red_green).solution
    assert (planes @ fit - red_green).abs().max() < 0.02
    slope = fit[:2] * (IMAGE_SIZE - 1) / 2
    scale = slope.norm(dim=0)
    assert ((scale > 1 / JITTER_SCALE - 0.01) & (scale < JITTER_SCALE + 0.01)).all()
    assert scale.std() > 0.05
    angle = torch.atan2(slope[1], slope[0])[::2]
    assert (angle.abs() < JITTER_ANGLE + 0.01).all()
    assert angle.std() > 0.05
    blue = batch.neighbors.pixels[:, :, 2]
    torch.testing.assert_close(blue, torch.full_like(blue, 90 / 127.5 - 1))


def test_any_number_of_neighbors(pack: Pack) -> None:
    batch = draw(pack, num_neighbors=(4,))
    assert batch.neighbors.mask.shape[1] == 4
    assert draw(pack, num_neighbors=(1,), candidates=1).neighbors.mask.shape[1] == 1


def test_the_number_of_neighbors_of_a_batch_is_drawn(pack: Pack) -> None:
    counts = [draw(pack, seed, num_neighbors=(1, 2, 2, 4)).neighbors.mask.shape[1] for seed in range(200)]
    assert set(counts) == {1, 2, 4}
    assert 80 < counts.count(2) < 120
    assert DataConfig(num_neighbors=(1, 5)).most_candidates == 5
    assert DataConfig(num_neighbors=(1, 2)).most_candidates == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_neighbors": (2, 0)}, "each at least 1"),
        ({"num_neighbors": ()}, "each at least 1"),
        ({"candidates": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"wrong_prob": 1.5}, "wrong_prob is a probability from 0 to 1, got 1.5"),
        ({"drop_text_prob": -0.1}, "drop_text_prob is a probability"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**changes)
    assert said in str(caught.value)
