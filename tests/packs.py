"""A training pack of noise, small enough to know by heart."""

import torch

from radt.training.pack import Pack, TextTable
from tests.networks import IMAGE_SIZE, generator, random_text

NUM_SCENES, NUM_LAYERS, NUM_PICTURES, CANDIDATES = 24, 6, 15, 4


def small_pack() -> Pack:
    """24 scenes of 6 layers, each with 4 candidates of 15 pictures; scene 5 has two, scene 6 has none."""
    g = generator(11)
    alpha = torch.randint(0, 3, (NUM_LAYERS, IMAGE_SIZE, IMAGE_SIZE, 1), generator=g) * 127
    colors = (torch.rand(NUM_LAYERS, IMAGE_SIZE, IMAGE_SIZE, 3, generator=g) * alpha).floor()
    neighbors = torch.stack([torch.randperm(NUM_PICTURES, generator=g)[:CANDIDATES] for _ in range(NUM_SCENES)])
    neighbors[5, 2:], neighbors[6] = -1, -1
    return Pack(
        layers=torch.cat([colors, alpha], dim=-1).to(torch.uint8),
        scene_layer=torch.arange(NUM_SCENES) % NUM_LAYERS,
        scene_ground=torch.randint(0, 256, (NUM_SCENES, 3), generator=g).to(torch.uint8),
        scene_mirrors=torch.arange(NUM_SCENES) % 3 != 0,
        scene_turns=torch.arange(NUM_SCENES) % 3 == 1,
        scene_text=TextTable.from_conditions([random_text(NUM_SCENES, seed=12)]),
        scene_neighbors=neighbors,
        pictures=torch.randint(0, 256, (NUM_PICTURES, IMAGE_SIZE, IMAGE_SIZE, 3), generator=g).to(torch.uint8),
        picture_text=TextTable.from_conditions([random_text(NUM_PICTURES, seed=13, num_tokens=3)]),
    )
