"""The search space: every strategy for a number of ranks, as heads and tails.

A head is an arrangement of ranks with its micro-batch and schedule, a tail says what is recomputed and sharded and how
tokens travel. Every head goes with every tail, so the space is their product and is never written out as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

ZERO_LEVELS = (0, 1)
SCHEDULES = ("gpipe", "1f1b")
TAIL_COLUMNS = ("dispatcher", "exchange", "recompute", "recompute_modules", "zero_dense", "zero_expert")


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of a space: masks over its heads and over its tails."""

    heads: NDArray[np.bool_]
    tails: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Space:
    """The legal heads and the tails of a job; strategy `place` is head `place // tails`, tail `place % tails`.

    `considered` strategies are the product of all heads with all tails, of which `illegal` break a rule of the heads.
    """

    heads: StrategyTable
    tails: StrategyTable
    considered: int
    illegal: int

    def select(self, **accepted: int | Sequence[int]) -> Selection:
        """Those whose columns have one of the accepted values: `select(recompute=2, micro_batch_size=[1, 2])`."""
        heads, tails = np.ones(len(self.heads), dtype=bool), np.ones(len(self.tails), dtype=bool)
        for name, values in accepted.items():
            table, mask = (self.tails, tails) if name in TAIL_COLUMNS else (self.heads, heads)
            mask &= np.isin(getattr(table, name), values)
        return Selection(heads, tails)

    def places(self, heads: NDArray, selection: Selection) -> NDArray[np.int64]:
        """The strategies of `heads` (indices) that differ from all others, with the selected tails."""
        tails = np.flatnonzero(selection.tails)
        same = redundant_mask(self.heads.take(heads), self.tails.take(tails))
        return (heads[:, None] * len(self.tails) + tails)[~same]

    def table(self, places: NDArray) -> StrategyTable:
        """The strategies of `places` as a table."""
        head, tail = np.divmod(places, len(self.tails))
        tails = self.tails.take(tail)
        return self.heads.take(head).with_columns(**{name: getattr(tails, name) for name in TAIL_COLUMNS})

    def strategy(self, place: int) -> Strategy:
        return self.table(np.array([place])).row(0)

    def redundant(self, selection: Selection) -> int:
        """How many of the selected strategies do the same as another one."""
        heads, tails = self.heads.take(selection.heads), self.tails.take(selection.tails)
        return int(np.count_nonzero(redundant_mask(heads, tails)))


def job_space(model: ModelSpec, train: TrainConfig, world_size: int) -> Space:
    """The space of all strategies of a job on `world_size` ranks."""
    heads, tails = all_heads(train, world_size), all_tails()
    legal = heads.take(legal_mask(heads, model, train, world_size))
    return Space(legal, tails, len(heads) * len(tails), (len(heads) - len(legal)) * len(tails))


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def all_heads(train: TrainConfig, world_size: int) -> StrategyTable:
    """Every combination of degrees that divide the ranks, micro-batch sizes that divide the batch, and schedules.

    The data-parallel degree is what the pipeline leaves over, the expert-data-parallel degree what the experts leave
    over; where that is not whole the row breaks the folding rule and falls out with the illegal ones.
    """
    table = StrategyTable.product(
        pipeline_parallel=divisors(world_size),
        expert_parallel=divisors(world_size),
        micro_batch_size=divisors(train.global_batch_size),
        schedule=map(SCHEDULE_NAMES.index, SCHEDULES),
    )
    data_parallel = world_size // table.pipeline_parallel
    return table.with_columns(data_parallel=data_parallel, expert_data_parallel=data_parallel // table.expert_parallel)


def all_tails() -> StrategyTable:
    """What is recomputed and sharded."""
    return StrategyTable.product(
        recompute=[RECOMPUTE_NAMES.index("none"), RECOMPUTE_NAMES.index("full")],
        zero_dense=ZERO_LEVELS,
        zero_expert=ZERO_LEVELS,
    )


def redundant_mask(heads: StrategyTable, tails: StrategyTable) -> NDArray[np.bool_]:
    """(heads, tails) that do as another does: sharding over one rank, GPipe without a pipeline (1F1B holds less)."""
    alone, experts_alone = heads.data_parallel * heads.context_parallel == 1, heads.expert_data_parallel == 1
    unpiped = (heads.pipeline_parallel == 1) & (heads.schedule == SCHEDULE_NAMES.index("gpipe"))
    return (
        (alone[:, None] & (tails.zero_dense > 0))
        | (experts_alone[:, None] & (tails.zero_expert > 0))
        | unpiped[:, None]
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
    return bool(legal_mask(all_heads(train, world_size), model, train, world_size).any())
