"""What each runtime can execute: one table of rules, which planner, exports and reports read.

A rule is judged for a million strategies at once or for one, and says what is in the way and how to go round it. The
rules of any runtime (`specs.legality.LEGAL`) come before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.legality import Job, Rule
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.runtimes import deepspeed, megatron, own, torchtitan
from pipermoe.specs.runtimes.limits import limit
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import EXCHANGE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

RuntimeName = Literal["pipermoe", "megatron", "torchtitan", "deepspeed"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A system that runs plans, as its messages call it, and what a strategy, model and job must be for it."""

    title: str
    rules: tuple[Rule, ...]

    def accepts(self, table: StrategyTable, job: Job) -> NDArray[np.bool_]:
        """Which rows it can execute."""
        accepted = np.ones(len(table), dtype=bool)
        for rule in self.rules:
            accepted &= rule.holds(table, job)
        return accepted


# What no other system has.
_LIBRARY = limit(
    "exchange",
    lambda table, job: table.exchange == EXCHANGE_NAMES.index("library"),
    "leaves all-to-alls to the communication library",
    lambda strategy, job: {"exchange": "library"},
)

RUNTIMES: dict[RuntimeName, Runtime] = {
    "pipermoe": Runtime(own.TARGET, own.RULES),
    "megatron": Runtime(megatron.TARGET, (_LIBRARY, *megatron.RULES)),
    "torchtitan": Runtime(torchtitan.TARGET, (_LIBRARY, *torchtitan.RULES)),
    "deepspeed": Runtime(deepspeed.TARGET, (_LIBRARY, *deepspeed.RULES)),
}


def _somewhere(table: StrategyTable, job: Job) -> NDArray[np.bool_]:
    return np.logical_or.reduce([runtime.accepts(table, job) for runtime in RUNTIMES.values()])


def _nowhere(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    """Why this runtime, which has the fewest rules about models, does not run it."""
    return next(rule.explain(strategy, job) for rule in own.RULES if not rule.accepts(strategy, job))


SOMEWHERE = Rule(_somewhere, _nowhere)


def rules_of(runtime: RuntimeName | Literal["any"]) -> tuple[Rule, ...]:
    """What a strategy has to obey, beside legality, to run there; `any`: on one of them."""
    return (SOMEWHERE,) if runtime == "any" else RUNTIMES[runtime].rules


def runs_on(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> tuple[RuntimeName, ...]:
    """The runtimes that can execute a legal strategy."""
    table, job = StrategyTable.of([strategy]), Job(model, train, strategy.world_size)
    return tuple(name for name, runtime in RUNTIMES.items() if runtime.accepts(table, job)[0])
