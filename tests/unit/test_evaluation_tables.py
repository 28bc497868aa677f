"""Cells as text: an estimate keeps its figures, however small it is."""

import re

import pytest

from radt.evaluation.results import Estimate
from radt.evaluation.tables import cell_text


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (4e-7, -1e-7, 9e-7, "4e-07 (-1e-07 to 9e-07)"),
        (0.0, -1e-9, 1e-9, "0 (-1e-09 to 1e-09)"),
        (0.001, 0.001, 0.001, "0.001 (0.001 to 0.001)"),
        (0.0, 0.0, 0.0, "0.00 (0.00 to 0.00)"),
        (0.84, 0.76, 0.9, "0.84 (0.76 to 0.90)"),
        (0.0, 0.0, 0.037, "0.00 (0.00 to 0.04)"),
        (0.0001, 0.0, 0.03, "0.00 (0.00 to 0.03)"),  # far below what the interval leaves open
        (159.2, 132.4, 185.0, "159 (132 to 185)"),
        (31.4159, 31.4159, 31.4159, "31.42 (31.42 to 31.42)"),
        (123456.7, 123456.7 - 2e-7, 123456.7 + 2e-7, "123456.700000 (123456.700000 to 123456.700000)"),
    ],
)
def test_an_estimate_as_text(value, low, high, text):
    assert cell_text(Estimate(value=value, low=low, high=high)) == text


@pytest.mark.parametrize("power", range(-12, 4))
def test_rounding_costs_at_most_a_twentieth_of_the_interval_at_any_size(power):
    value, low, high = (each * 10.0**power for each in (4.0, -1.2, 9.3))
    text = cell_text(Estimate(value=value, low=low, high=high))
    shown = [float(each) for each in re.split(r" \(| to |\)", text)[:3]]
    assert shown == pytest.approx([value, low, high], abs=0.05 * (high - low))
