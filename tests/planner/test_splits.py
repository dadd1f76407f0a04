from itertools import combinations, pairwise

import pytest

from pipermoe.planner.splits import balanced_split, consecutive_sums


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
def test_the_longest_stage_is_as_short_as_in_any_cut(stages):
    seconds = [3, 1, 1, 4, 1, 5, 9]

    def longest(ends):
        cuts = (0, *ends, len(seconds))
        return max(sum(seconds[a:b]) for a, b in pairwise(cuts))

    split = balanced_split(seconds, consecutive_sums(seconds), stages)
    assert len(split) == stages
    assert sum(split) == len(seconds)
    ends = [sum(split[: i + 1]) for i in range(stages - 1)]
    assert longest(ends) == min(map(longest, combinations(range(1, len(seconds)), stages - 1)))
