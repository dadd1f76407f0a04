"""What each runtime can execute: one table of rules, which planner, exports and reports read.

A rule is judged for a million strategies at once or for one, and says what is in the way and how to go round it. The
rules of any runtime (`specs.legality.LEGAL`) come before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import Job, Rule, columns_read
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import RuntimeName
from pipermoe.specs.runtimes import deepspeed, megatron, own, torchtitan
from pipermoe.specs.runtimes.limits import limit
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import EXCHANGE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig


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


Choice = RuntimeName | Literal["any"]


def executed_by(choice: Choice, model: ModelSpec, train: TrainConfig) -> tuple[tuple[Rule, ...], ...]:
    """Rules about strategies, of which a plan for `choice` has to obey one tuple; for `any` those of several runtimes.

    Plans of our own kind are made for every model and job, also of which our runtime does not train all parts.
    Raises UserError where another runtime is chosen that does not have the model or the job.
    """
    job = Job(model, train, world_size=1)
    found = []
    for name, runtime in RUNTIMES.items():
        if choice not in (name, "any"):
            continue
        fixed = [rule for rule in runtime.rules if not columns_read(rule, job)]
        broken = next((rule for rule in fixed if not rule.accepts(Strategy(), job)), None)
        if broken is None or name == "pipermoe":
            found.append(tuple(rule for rule in runtime.rules if rule not in fixed))
        elif choice == name:
            key, value, reason = broken.sentence(Strategy(), job)
            raise UserError(describe_value("", key, value, f"{runtime.title}: {reason}"))
    return tuple(found)


def runs_on(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> tuple[RuntimeName, ...]:
    """The runtimes that can execute a legal strategy."""
    table, job = StrategyTable.of([strategy]), Job(model, train, strategy.world_size)
    return tuple(name for name, runtime in RUNTIMES.items() if runtime.accepts(table, job)[0])
