"""Choosing few of many combinations of options so that every two values meet."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np


def covering(
    rows: Sequence[tuple[Hashable, ...]], options: Mapping[str, Sequence[Any]]
) -> list[tuple[tuple[Hashable, ...], dict[str, Any]]]:
    """For every row of given values the combination of `options` that covers most pairs that no row before had.

    Pairs are of options among themselves and of an option with a value of the row. All pairs covered, the combinations
    used least come first. The result depends on nothing but the arguments.
    """
    combinations = [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values())]
    items = {item: i for i, item in enumerate((name, value) for name, values in options.items() for value in values)}
    chosen_CO = np.array([[items[item] for item in each.items()] for each in combinations])
    first, second = np.triu_indices(len(options), 1)
    inner_CP = chosen_CO[:, first] * len(items) + chosen_CO[:, second]
    covered = np.zeros(len(items) ** 2, dtype=bool)
    met = {value: np.zeros(len(items), dtype=bool) for row in rows for value in row}
    used = np.zeros(len(combinations), dtype=np.int64)
    result = []
    for row in rows:
        gain = (~covered[inner_CP]).sum(1) + sum((~met[value][chosen_CO]).sum(1) for value in row)
        best = int(np.lexsort((used, -gain))[0])
        used[best] += 1
        covered[inner_CP[best]] = True
        for value in row:
            met[value][chosen_CO[best]] = True
        result.append((row, combinations[best]))
    return result
