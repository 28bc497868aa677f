import pytest
import torch

from index.errors import ConfigError
from radt.diffusion.thresholding import dynamic_threshold, no_threshold, static_threshold


def image(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def test_static_clips_at_every_step():
    assert static_threshold(image(-3, 0.5, 2), 0).flatten().tolist() == [-1, 0.5, 1]


def test_dynamic_by_hand():
    # 4 values, percentile 0.75: the third smallest magnitude is kappa = 2; 4 is clipped to it.
    x0 = dynamic_threshold(10, percentile=0.75)(image(1, -2, 4, 0), 3)
    assert x0.flatten().tolist() == [0.5, -1, 1, 0]


def test_dynamic_leaves_images_in_range_alone():
    for x0 in (image(-1, 0.3, 1), image(-0.2, 0.1, 0.05)):  # a dim image is not stretched
        assert torch.equal(dynamic_threshold(10)(x0, 0), x0)


def test_dynamic_judges_each_image_by_itself():
    calm, loud = image(0.1, 0.2, 0.9, 1), image(1, 5, 2, 3)
    threshold = dynamic_threshold(10)
    both = threshold(torch.cat([calm, loud]), 0)
    assert torch.equal(both, torch.cat([threshold(calm, 0), threshold(loud, 0)]))


def test_dynamic_clips_at_the_last_step():
    x0 = image(0.5, 4)
    threshold = dynamic_threshold(3, percentile=1.0)
    assert threshold(x0, 1).flatten().tolist() == [0.125, 1]
    assert threshold(x0, 2).flatten().tolist() == [0.5, 1]


@pytest.mark.parametrize("percentile", [0.0, 1.2, 99.5])
def test_percentile_must_be_a_fraction(percentile):
    with pytest.raises(ConfigError, match="percentile"):
        dynamic_threshold(10, percentile=percentile)


def test_no_threshold_is_the_identity():
    assert no_threshold(image(7), 0).item() == 7
