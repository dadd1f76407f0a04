import numpy as np
import pytest

from pipermoe.resources.kinds import distinct


@pytest.mark.parametrize("limit", [1, 3, 128, 200, 1 << 20])  # one kind, codes for a table, to sort, over 63 bits
def test_the_kinds_of_rows_are_those_that_a_sort_finds(limit):
    columns = np.random.default_rng(limit).integers(0, limit, size=(4, 50_000))
    columns = columns.repeat(2, axis=1)
    chosen, kind = distinct(list(columns))
    assert (columns[:, chosen[kind]] == columns).all()
    assert (columns[:, chosen] == np.unique(columns, axis=1)).all()  # sorted by the first column, then the next


def test_narrow_columns_have_the_kinds_of_wide_ones():
    columns = np.random.default_rng(0).integers(-1, 127, size=(3, 10_000))
    narrow = [column.astype(np.int8) for column in columns]
    assert (distinct(narrow).of == distinct(list(columns)).of).all()
