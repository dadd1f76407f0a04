"""The rule that the schedule of a strategy exists, for a million rows or one: what `RECIPES` say, as arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipermoe.schedule.builders import MOST_FORWARDS, RECIPES, problem
from pipermoe.specs.legality import LEGAL, Job, Rule
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, UNKNOWN, StrategyTable

_RECIPES = [RECIPES[name] for name in SCHEDULE_NAMES]
_NO_LIMIT = np.iinfo(np.int64).max
_LEAST_CHUNKS = np.array([recipe.virtual_stages[0] for recipe in _RECIPES])
_MOST_CHUNKS = np.array([recipe.virtual_stages[1] or _NO_LIMIT for recipe in _RECIPES])
_RANKS_STEP = np.array([recipe.ranks_step for recipe in _RECIPES])
_MICROBATCHES_STEP = np.array([recipe.microbatches_step for recipe in _RECIPES])
_MICROBATCHES_PER_RANK = np.array([recipe.microbatches_per_rank for recipe in _RECIPES])


def _exists(table: StrategyTable, job: Job) -> NDArray[np.bool_]:
    which, ranks, chunks = table.schedule, table.pipeline_parallel, table.virtual_stages
    microbatches = table.microbatches(job.train.global_batch_size)
    return (
        (which != UNKNOWN)
        & (chunks >= _LEAST_CHUNKS[which])
        & (chunks <= _MOST_CHUNKS[which])
        & (ranks % _RANKS_STEP[which] == 0)
        & (microbatches % _MICROBATCHES_STEP[which] == 0)
        & (microbatches >= np.maximum(_MICROBATCHES_PER_RANK[which] * ranks, 1))
        & (microbatches * ranks * chunks <= MOST_FORWARDS)
    )


def _explain(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    microbatches = strategy.microbatches(job.train.global_batch_size)
    found = problem(strategy.schedule, strategy.pipeline_parallel, microbatches, strategy.virtual_stages)
    assert found, "asked only where the rule is broken"
    return found


SCHEDULE_EXISTS = Rule(_exists, _explain)
POSSIBLE = (*LEGAL, SCHEDULE_EXISTS)  # what every strategy obeys, whatever runs it
