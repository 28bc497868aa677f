"""The probe of a network in training: what it reads, and that training does not notice it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from radt.diffusion.schedule import NoiseSchedule
from radt.training.data import DataConfig
from radt.training.loop import Objective, step_generator
from radt.training.probe import EXAMPLES, keep_reading, probe, probe_batch, side_by_side
from tests.networks import new_unet, random_neighbors, random_unet
from tests.packs import small_pack

DATA = DataConfig(batch_size=5)
OBJECTIVE = Objective(schedule=NoiseSchedule())


def read(network, pack=None, **changes):
    return probe(network, pack or small_pack(), data=DATA, objective=OBJECTIVE, **({"seed": 0} | changes))


def test_a_network_that_reads_no_neighbour_gains_nothing_from_one():
    fresh = read(new_unet())  # what a layer adds starts at zero
    assert fresh.loss == fresh.loss_without == fresh.loss_shuffled
    assert fresh.gain == 0
    deaf = read(random_unet(encoder_neighbor_levels=(), decoder_neighbor_levels=()))
    assert deaf.gain == deaf.gain_over_shuffled == 0
    assert (deaf.attention_right, deaf.attention_wrong, deaf.attention_sink) == (0, 0, 1)


def test_losses_are_those_of_the_objective_with_and_without_neighbours():
    network = random_unet()
    found = read(network, seed=3)
    batch = probe_batch(small_pack(), DATA, step_generator(3, 0, -2, device=torch.device("cpu")))
    assert found.examples == len(batch.x0)

    def loss(neighbors):
        shown = dataclasses.replace(batch, neighbors=neighbors)
        generator = step_generator(3, 0, -3, device=torch.device("cpu"))
        with torch.no_grad():
            return OBJECTIVE.loss(network, shown, generator).item()

    nobody = dataclasses.replace(batch.neighbors, mask=torch.zeros_like(batch.neighbors.mask))
    assert found.loss == loss(batch.neighbors)
    assert found.loss_without == loss(nobody)
    assert found.loss_shuffled not in (found.loss, found.loss_without)
    assert found.gain == pytest.approx(1 - found.loss / found.loss_without)


def test_attention_is_shares_of_one():
    found = read(random_unet())
    shares = found.attention_right, found.attention_wrong, found.attention_sink
    assert all(0 < share < 1 for share in shares)
    assert sum(shares) == pytest.approx(1)


def test_the_batch_is_always_the_same_and_has_a_prompt_and_its_right_neighbour():
    pack = small_pack()
    generators = [step_generator(0, 0, -2, device=torch.device("cpu")) for _ in range(2)]
    one, two = (probe_batch(pack, DATA, generator) for generator in generators)
    assert torch.equal(one.x0, two.x0)
    assert torch.equal(one.neighbors.pixels, two.neighbors.pixels)
    assert one.neighbors.mask.shape[1] == 1
    assert one.neighbors.mask.all()
    assert one.text.mask.any(dim=1).all()
    assert EXAMPLES // 2 < len(one.x0) <= EXAMPLES  # a scene without candidates is not among them


def test_nobody_notices():
    network = random_unet()
    network.train()
    before, state = {n: t.clone() for n, t in network.state_dict().items()}, torch.get_rng_state()
    assert read(network) == read(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pack_without_neighbours_has_nothing_to_read(tmp_path: Path):
    pack = small_pack()
    alone = dataclasses.replace(pack, scene_neighbors=torch.full_like(pack.scene_neighbors, -1))
    assert read(random_unet(), alone) is None
    keep_reading(tmp_path, 1, 5, None)
    assert not list(tmp_path.iterdir())


def test_a_reading_is_kept_once_however_often_its_step_is_saved(tmp_path: Path):
    found = read(random_unet())
    for step in (2, 4, 4, 6, 4):  # a run that was killed comes by again
        keep_reading(tmp_path, step, 5 * step, found)
    lines = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["gain"] == found.gain


def test_two_neighbours_lie_side_by_side():
    one, two = random_neighbors(3, 1, seed=1), random_neighbors(3, 1, seed=1)
    both = side_by_side(one, two)
    assert both.mask.shape == (3, 2)
    assert torch.equal(both.pixels[:, 0], both.pixels[:, 1])
    assert torch.equal(both.text.tokens[:, 1], two.text.tokens[:, 0])
