"""A lower bound of a step's seconds in a fraction of the time of `resources.bound`, to look closer only where it pays.

Two of the paths of `resources.chains`, without messages and ramps, and nothing of the end of the step: the rank that
has most to do works through all micro-batches; and the rank that begins last, after the first micro-batch has come
through the stages before it, and before the last gradient has gone back through them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.groups import Groups, Parts, pipelines_of
from pipermoe.resources.price_list import Price
from pipermoe.resources.stages import rank_classes
from pipermoe.resources.unit_seconds import PARTS, SENDS, Work
from pipermoe.schedule.traits import schedule_traits

COMPUTING, EXCHANGING = (Work.FORWARD, Work.INPUT_GRAD), (Work.FORWARD_EXCHANGE, Work.BACKWARD_EXCHANGE)


def quick_bound(groups: Groups, price_of: Price) -> NDArray[np.float64]:
    """Seconds (rows,) that no simulation of the rows of `groups` undercuts, `price_of` being `unit_seconds`."""
    names, pipe = list(pipelines_of(groups.heads.take(groups.pipe.rows))), groups.pipe.of[groups.head.of]
    traits = [schedule_traits(*name) for name in names]
    overlaps, splits, mirrored = np.array([(t.overlaps, t.splits_backward, t.mirrored) for t in traits]).T[:, pipe]
    each = price_of(groups.insides)[:, :SENDS].reshape(-1, len(Work), PARTS)
    works = each[:, COMPUTING].sum(axis=1), each[:, EXCHANGING].sum(axis=1), each[:, Work.WEIGHT_GRAD]
    computing, exchanging, weights = (work[groups.inside.of] for work in works)
    microbatches = groups.microbatches[groups.head.of] * np.where(mirrored, 0.5, 1.0)

    def through_all(holds: NDArray[np.int64], weight_grads: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of ranks that hold such parts (pipes, ranks, parts): (combos, ranks). Pairs hide one kind of work."""
        computes, exchanges = (
            np.einsum("crp,cp->cr", holds[pipe], work) for work in (computing + weight_grads, exchanging)
        )
        together = np.where(overlaps[:, None], np.maximum(computes, exchanges), computes + exchanges)
        return microbatches[:, None] * together

    found = [_ranks(*name, parts) for name, parts in zip(names, groups.parts, strict=True)]
    classes = np.zeros((len(found), max(len(holds) for holds, *_ in found), PARTS), dtype=np.int64)
    for place, (holds, *_) in enumerate(found):
        classes[place, : len(holds)] = holds
    last, before = (np.array(column) for column in list(zip(*found, strict=True))[1:])
    most = through_all(classes, weights).max(axis=1)
    around = np.einsum("cp,cp->c", before[pipe], computing + exchanging)
    latest = around + through_all(last[:, None], weights * ~splits[:, None])[:, 0]
    return np.maximum(most, latest).take(groups.combo)


@lru_cache(maxsize=8192)
def _ranks(
    schedule: str, pipeline_parallel: int, virtual_stages: int, parts: Parts
) -> tuple[NDArray, NDArray, NDArray]:
    """What the classes of ranks hold (classes, parts), what the one that begins last holds, and what lies before it."""
    stages_of = schedule_traits(schedule, pipeline_parallel, virtual_stages).stages_of
    last = max(stages_of, key=min)
    of_stage = np.array(parts)
    return rank_classes(stages_of, parts)[0], of_stage[list(last)].sum(axis=0), of_stage[: min(last)].sum(axis=0)
