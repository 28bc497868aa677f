"""KnownIds equals a set, however it grows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from index.ingest.ledger import KnownIds

IDS = st.lists(st.integers(0, 50), max_size=12)


@given(IDS, st.lists(IDS, max_size=8), IDS)
def test_known_ids_are_a_set(first: list[int], rest: list[list[int]], asked: list[int]) -> None:
    known = KnownIds(np.array(first, np.int64))
    for ids in rest:
        known.add(np.array(ids, np.int64))
    expected = set(first).union(*rest)
    assert known.among(np.array(asked, np.int64)).tolist() == [i for i in asked if i in expected]
