"""The search space: every strategy for a number of ranks, as one table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

ZERO_LEVELS = (0, 1)
SCHEDULES = ("gpipe", "1f1b")


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def all_combinations(train: TrainConfig, world_size: int) -> StrategyTable:
    """Every combination of degrees that divide the ranks, micro-batch sizes that divide the batch, and switches.

    The data-parallel degree is what the pipeline leaves over, the expert-data-parallel degree what the experts leave
    over; where that is not whole the row breaks the folding rule and falls out with the illegal ones.
    """
    table = StrategyTable.product(
        pipeline_parallel=divisors(world_size),
        expert_parallel=divisors(world_size),
        micro_batch_size=divisors(train.global_batch_size),
        schedule=map(SCHEDULE_NAMES.index, SCHEDULES),
        recompute=[RECOMPUTE_NAMES.index("none"), RECOMPUTE_NAMES.index("full")],
        zero_dense=ZERO_LEVELS,
        zero_expert=ZERO_LEVELS,
    )
    data_parallel = world_size // table.pipeline_parallel
    return table.with_columns(data_parallel=data_parallel, expert_data_parallel=data_parallel // table.expert_parallel)


def redundant_mask(table: StrategyTable) -> NDArray[np.bool_]:
    """Rows that do the same as another row: sharding over one rank, and GPipe without a pipeline (1F1B holds less)."""
    return (
        ((table.zero_dense > 0) & (table.data_parallel == 1))
        | ((table.zero_expert > 0) & (table.expert_data_parallel == 1))
        | ((table.pipeline_parallel == 1) & (table.schedule == SCHEDULE_NAMES.index("gpipe")))
    )


def require_legal_world(model: ModelSpec, train: TrainConfig, world_size: int, nearby: int = 4) -> None:
    """UserError when no arrangement of `world_size` ranks is legal; it names the nearest numbers that are."""
    if _has_legal(model, train, world_size):
        return
    limit = model.num_layers * train.global_batch_size  # more ranks than this have no layer or no sequence of their own
    candidates = sorted(range(1, min(limit, 2 * world_size) + 1), key=lambda n: (abs(n - world_size), n))
    legal = []
    for number in candidates:
        if _has_legal(model, train, number):
            legal.append(number)
        if len(legal) == nearby:
            break
    rule = (
        f"no arrangement is legal for {model.name} with num_layers = {model.num_layers}, num_experts = "
        f"{model.moe.num_experts}, global_batch_size = {train.global_batch_size}; "
        f"nearest: {', '.join(map(str, sorted(legal)))}"
    )
    raise UserError(describe_value("", "ranks", world_size, rule))


def _has_legal(model: ModelSpec, train: TrainConfig, world_size: int) -> bool:
    return bool(legal_mask(all_combinations(train, world_size), model, train, world_size).any())
