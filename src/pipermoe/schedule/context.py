"""What actions leave behind on their rank for those that follow: which weights were used last, and which gradients are
on their way.

Under ZeRO-2 and 3 what is whole on a rank while an action runs depends on the actions before it, not on their number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipermoe.schedule.action import Kind
from pipermoe.schedule.columns import KINDS, Columns, Ints

# P elementary actions, N instants, U actions that use weights, pairs taken as one

USES = 4  # what they leave whole is remembered but for a unit that lingers beside the two that stay


class Use(NamedTuple):
    """A forward, B or I; of a pair the backward, `beside` the forward of that stage (alone: -1)."""

    kind: Kind
    stage: int
    beside: int


class Context(NamedTuple):
    """The last `uses` of weights before an action, the latest at the end, of any in a row that are on one stage the
    last. The stage whose weight gradients were `added` last, and that of which some are `adding` while a pair runs
    (-1: none).
    """

    uses: tuple[Use, ...] = ()
    added: int = -1
    adding: int = -1


NO_CONTEXT = Context()


def contexts(columns: Columns, uses: Ints, first: Ints, weights: Ints, runs: Ints, instants: Ints) -> Ints:
    """Codes of the context of every instant, (2 + USES, N): what `Decoder` reads.

    `uses` are the places of the U actions that use weights, of a pair that of the backward, and `first` those of the
    forwards beside them, or the same. W actions `weights` run at the places `runs`. An instant is the place of an
    action, of a pair that of the backward.
    """
    stages = int(columns.stage.max()) + 1
    beside = np.where(first < uses, columns.stage[first], -1)
    code = (columns.kind[uses] * stages + columns.stage[uses]) * (stages + 1) + beside + 1
    rank = columns.rank[uses]
    begins = np.any(np.diff([rank, columns.stage[uses], beside], axis=1, prepend=-2), axis=0)
    run = np.maximum.accumulate(np.where(begins, np.arange(len(uses)), 0))
    here = columns.rank[instants]

    use, found = np.searchsorted(uses, instants) - 1, []
    for _ in range(USES):
        use = np.where((use >= 0) & (rank[use] == here), use, -1)
        found.append(np.where(use >= 0, code[use], -1))
        use = np.where(use >= 0, run[use] - 1, -1)
    adds = np.concatenate([runs, np.flatnonzero(columns.of_kind(Kind.BACKWARD))])
    added = np.concatenate([columns.stage[weights], columns.stage[columns.of_kind(Kind.BACKWARD)]])
    order = np.argsort(adds, kind="stable")
    adds, added = adds[order], added[order]
    before = np.searchsorted(adds, instants) - 1
    pair = np.isin(instants, uses[first < uses])
    now = np.minimum(np.searchsorted(adds, instants), len(adds) - 1)
    return np.stack(
        [
            np.where((before >= 0) & (columns.rank[adds[before]] == here), added[before], -1),
            np.where(pair & (adds[now] == instants), added[now], -1),
            *found,
        ]
    )


class Decoder:
    """Contexts from their codes, of a schedule with so many stages."""

    def __init__(self, columns: Columns) -> None:
        self._stages = int(columns.stage.max()) + 1
        self._known: dict[tuple[int, ...], Context] = {}

    def __call__(self, *codes: int) -> Context:
        if codes not in self._known:
            added, adding, *uses = codes
            self._known[codes] = Context(tuple(self._use(code) for code in uses[::-1] if code >= 0), added, adding)
        return self._known[codes]

    def _use(self, code: int) -> Use:
        action, beside = divmod(code, self._stages + 1)
        kind, stage = divmod(action, self._stages)
        return Use(KINDS[kind], stage, beside - 1)
