"""Sets of ids: what numpy's own give, sooner."""

import numpy as np
import pytest

from index.search.ids import contains, distinct


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 5), (40, 60)])
def test_they_agree_with_numpy(sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    one, other = (generator.integers(-50, 50, size) for size in sizes)
    assert distinct(one, other).tolist() == np.union1d(one, other).tolist()
    assert contains(np.sort(one), other).tolist() == np.isin(other, one).tolist()
