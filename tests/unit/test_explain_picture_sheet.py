"""The heat maps of a sheet: colours grow lighter with the value, and a hot place is where the value is."""

import numpy as np
import pytest
import torch
from PIL import Image

from radt.explain_sheet import SIDE, color_scale, colors_of, heat_map

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of linear light; monotone enough for colours as they are stored


def test_a_hotter_colour_is_a_lighter_one():
    light = colors_of(np.linspace(0, 1, 200)) @ LUMINANCE
    assert (np.diff(light) > 0).all()
    assert light[0] < 5
    assert light[-1] > 240


@pytest.mark.parametrize("side", [8, 32, 600])
def test_the_lightest_place_is_where_the_value_is_whatever_the_size_of_the_picture(side):
    values = torch.zeros(8, 8)
    values[1, 6] = 0.5
    drawn = np.asarray(heat_map(Image.new("RGB", (side, side), "gray"), values, 0.5)) @ LUMINANCE
    assert drawn.shape == (SIDE, SIDE)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (row * 8 // SIDE, column * 8 // SIDE) == (1, 6)


def test_values_beyond_the_scale_are_its_end_and_a_scale_of_nothing_is_cold():
    picture = Image.new("RGB", (8, 8), "gray")
    beyond = heat_map(picture, torch.full((4, 4), 9.0), 0.5)
    assert np.array_equal(beyond, heat_map(picture, torch.full((4, 4), 0.5), 0.5))
    nothing = heat_map(picture, torch.zeros(4, 4), 0.0)
    assert np.array_equal(nothing, heat_map(picture, torch.zeros(4, 4), 1.0))


def test_the_bar_runs_through_all_colours():
    bar = np.asarray(color_scale(0.5))
    assert np.array_equal(bar[0], colors_of(np.linspace(0, 1, SIDE)).round().astype(np.uint8))
