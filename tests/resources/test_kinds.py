import numpy as np
import pytest

from pipermoe.resources.kinds import distinct


@pytest.mark.parametrize("limit", [3, 200, 1 << 20])  # few kinds, kinds that share slots, keys of more than 63 bits
def test_the_kinds_of_rows_are_those_that_a_sort_finds(limit):
    columns = np.random.default_rng(limit).integers(0, limit, size=(4, 100_000))
    chosen, kind = distinct(list(columns))
    assert (columns[:, chosen[kind]] == columns).all()
    assert len(chosen) == len(np.unique(columns, axis=1).T)
