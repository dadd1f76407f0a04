"""The search space: every strategy for a number of ranks, as heads and tails.

A head is an arrangement of ranks with its micro-batch, its schedule and its cut of the layers; a tail says what is
recomputed and sharded and who moves the tokens. Every head goes with every tail, so the space is their product, and
only what could win is ever written out: a head first with all that may be recomputed, its branches, and a branch with
its tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.axes import (
    PIPELINE_COLUMNS,
    TAIL_COLUMNS,
    all_bodies,
    all_pipelines,
    all_tails,
    redundant_pipelines,
    redundant_tails,
)
from pipermoe.planner.job import Job
from pipermoe.resources.kinds import distinct
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import LEGAL, Rule, columns_read, legal_mask
from pipermoe.specs.legality import Job as LegalityJob
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.runtimes.own import EXECUTABLE
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

Runtimes = tuple[tuple[Rule, ...], ...]
OTHER_COLUMNS = (*PIPELINE_COLUMNS, *TAIL_COLUMNS)  # than those of bodies


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of a space: masks over its heads and over its tails."""

    heads: NDArray[np.bool_]
    tails: NDArray[np.bool_]


@dataclass(frozen=True)
class Space:
    """The heads and the tails of a job; strategy `place` is head `place // tails`, tail `place % tails`.

    Tails that recompute the same follow each other, so it is in branch `place // tails_of_branch`.
    Of `considered` strategies, all heads with all tails, `illegal` break a rule; of the others those that are as good
    as another one are left out, heads at once, (head, tail) where `open_tails` says no.
    """

    heads: StrategyTable
    tails: StrategyTable
    open_tails: NDArray[np.bool_]
    considered: int
    illegal: int

    @property
    def redundant(self) -> int:
        """How many strategies are as good as another one."""
        return self.considered - self.illegal - self.count(self.select())

    def select(self, **accepted: int | Sequence[int]) -> Selection:
        """Those whose columns have one of the accepted values: `select(recompute=2, micro_batch_size=[1, 2])`."""
        heads, tails = np.ones(len(self.heads), dtype=bool), np.ones(len(self.tails), dtype=bool)
        for name, values in accepted.items():
            table, mask = (self.tails, tails) if name in TAIL_COLUMNS else (self.heads, heads)
            mask &= np.isin(getattr(table, name), values)
        return Selection(heads, tails)

    def count(self, selection: Selection) -> int:
        """How many strategies are selected that no other one replaces."""
        return int(np.count_nonzero(self.open_tails[selection.heads] & selection.tails))

    def places(self, heads: NDArray, selection: Selection) -> NDArray[np.int64]:
        """The strategies of `heads` (indices) that differ from all others, with the selected tails."""
        head, tail = np.nonzero(self.open_tails[heads] & selection.tails)
        return heads[head] * len(self.tails) + tail

    @cached_property
    def tails_of_branch(self) -> int:
        """How many tails recompute the same."""
        different = distinct([self.tails.recompute, self.tails.recompute_modules]).rows
        return len(self.tails) // len(different)

    def branches(self, heads: NDArray, selection: Selection) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The branches of `heads` (indices) with a selected tail, and how many strategies each has."""
        shape = len(heads), len(self.tails) // self.tails_of_branch, self.tails_of_branch
        some = (self.open_tails[heads] & selection.tails).reshape(shape).sum(axis=2)
        head, branch = np.nonzero(some)
        return heads[head] * some.shape[1] + branch, some[head, branch]

    def places_of(self, branches: NDArray, selection: Selection) -> NDArray[np.int64]:
        """As `places`, of branches."""
        width = self.tails_of_branch
        selected = selection.tails.reshape(-1, width)
        branch, tail = np.nonzero(self.open_tails.reshape(-1, width)[branches] & selected[branches % len(selected)])
        return branches[branch] * width + tail

    def branch_table(self, branches: NDArray) -> StrategyTable:
        """The first strategy of each branch."""
        return self.table(branches * self.tails_of_branch)

    def table(self, places: NDArray) -> StrategyTable:
        """The strategies of `places` as a table."""
        head, tail = np.divmod(places, len(self.tails))
        tails = self.tails.take(tail)
        return self.heads.take(head).with_columns(**{name: tails.columns[name] for name in TAIL_COLUMNS})

    def strategy(self, place: int) -> Strategy:
        return self.table(np.array([place])).row(0)


def job_space(job: Job, splits: tuple[tuple[int, ...], ...] = ((),)) -> Space:
    """The space of all strategies of a job that are legal and that one of its runtimes executes.

    `splits[n]` is the balanced cut into n stages, () where there is no better one than the even cut.
    """
    everything, pipelines = all_bodies(job.train, job.world_size), all_pipelines(job.platform, job.world_size)
    tails = all_tails(job.model, job.platform)
    bodies = everything.take(_legal_bodies(everything, job.model, job.train, job.world_size, job.runtimes))
    legal = _legal_pipelines(replace(bodies, splits=splits), pipelines, job)
    body, pipeline = np.nonzero(legal & ~redundant_pipelines(bodies, pipelines, job.platform))
    heads = _heads(replace(bodies.take(body), splits=splits), pipelines.take(pipeline))
    runs = _executable(heads, tails, job)
    considered = len(everything) * len(pipelines) * len(tails)
    illegal = considered - int(np.count_nonzero(legal)) * len(tails) + int(np.count_nonzero(~runs))
    some = np.flatnonzero(runs.any(axis=1))
    heads, runs = heads.take(some), runs[some]
    return Space(heads, tails, runs & ~redundant_tails(heads, tails), considered, illegal)


def _executable(heads: StrategyTable, tails: StrategyTable, job: Job) -> NDArray[np.bool_]:
    """(heads, tails): which obey all rules of one of the job's runtimes, and those of legality that read tails."""
    judged = LegalityJob(job.model, job.train, job.world_size)
    found = np.zeros((len(heads), len(tails)), dtype=bool)
    of_any = tuple(rule for rule in LEGAL if not columns_read(rule, judged).isdisjoint(TAIL_COLUMNS))
    for rules in ((*of_any, *each) for each in job.runtimes):
        of_tails = [rule for rule in rules if not columns_read(rule, judged).isdisjoint(TAIL_COLUMNS)]
        obeys = np.ones(len(heads), dtype=bool)
        for rule in rules:
            if rule not in of_tails:
                obeys &= rule.holds(heads, judged)
        rows = np.flatnonzero(obeys)
        found[rows] |= _with_tails(of_tails, heads.take(rows), tails, judged) if of_tails and len(rows) else True
    return found


def _with_tails(rules: list[Rule], heads: StrategyTable, tails: StrategyTable, job: LegalityJob) -> NDArray[np.bool_]:
    """(heads, tails): which obey `rules`; heads that agree in what these read are judged once."""
    read = frozenset[str]().union(*(columns_read(rule, job) for rule in rules))
    kinds = distinct([getattr(heads, name) for name in sorted(read.difference(TAIL_COLUMNS))])
    kind, tail = (each.ravel() for each in np.indices((len(kinds.rows), len(tails))))
    columns = {name: getattr(tails, name)[tail] for name in TAIL_COLUMNS}
    table = heads.take(kinds.rows[kind]).with_columns(**columns)
    obeys = np.logical_and.reduce([rule.holds(table, job) for rule in rules])
    return obeys.reshape(len(kinds.rows), -1)[kinds.of]


def _heads(bodies: StrategyTable, pipelines: StrategyTable) -> StrategyTable:
    """Bodies with the pipelines beside them; a balanced cut (1) becomes the index of the cut into so many stages."""
    table = bodies.with_columns(**{name: getattr(pipelines, name) for name in PIPELINE_COLUMNS})
    return table.with_columns(layer_split=table.layer_split * table.num_stages)


def _legal_pipelines(bodies: StrategyTable, pipelines: StrategyTable, job: Job) -> NDArray[np.bool_]:
    """(bodies, pipelines): which schedules and cuts exist for the ranks and micro-batches of each body."""
    kinds = distinct([bodies.pipeline_parallel, bodies.microbatches(job.train.global_batch_size)])
    body, pipeline = (each.ravel() for each in np.indices((len(kinds.rows), len(pipelines))))
    table = _heads(bodies.take(kinds.rows[body]), pipelines.take(pipeline))
    known = np.array([bool(split) for split in bodies.splits])
    cut = table.layer_split
    exists = (cut == 0) | ((cut < len(known)) & known[np.minimum(cut, len(known) - 1)])
    table = table.with_columns(layer_split=np.where(exists, cut, 0))
    legal = legal_mask(table, job.model, job.train, job.world_size, POSSIBLE)
    return (legal & exists).reshape(len(kinds.rows), -1)[kinds.of]


def require_legal_world(
    model: ModelSpec, train: TrainConfig, world_size: int, runtimes: Runtimes = (EXECUTABLE,), nearby: int = 4
) -> None:
    """UserError when no arrangement of `world_size` ranks is legal; it names the nearest numbers that are."""
    if _has_legal(model, train, world_size, runtimes):
        return
    limit = model.num_layers * train.global_batch_size  # more ranks than this have no layer or no sequence of their own
    candidates = sorted(range(1, min(limit, 2 * world_size) + 1), key=lambda n: (abs(n - world_size), n))
    legal = []
    for number in candidates:
        if _has_legal(model, train, number, runtimes):
            legal.append(number)
        if len(legal) == nearby:
            break
    rule = (
        f"no arrangement is legal for {model.name} with num_layers = {model.num_layers}, num_experts = "
        f"{model.moe.num_experts}, global_batch_size = {train.global_batch_size}; "
        f"nearest: {', '.join(map(str, sorted(legal)))}"
    )
    raise UserError(describe_value("", "ranks", world_size, rule))


def _has_legal(model: ModelSpec, train: TrainConfig, world_size: int, runtimes: Runtimes) -> bool:
    return bool(_legal_bodies(all_bodies(train, world_size), model, train, world_size, runtimes).any())


def _legal_bodies(
    bodies: StrategyTable, model: ModelSpec, train: TrainConfig, world_size: int, runtimes: Runtimes
) -> NDArray[np.bool_]:
    """Which arrangements are legal and, whatever the pipeline and tail, may obey all rules of one of the runtimes."""
    job = LegalityJob(model, train, world_size)
    found = np.zeros(len(bodies), dtype=bool)
    for rules in runtimes:
        of_bodies = tuple(rule for rule in rules if not columns_read(rule, job).intersection(OTHER_COLUMNS))
        found |= legal_mask(bodies, model, train, world_size, of_bodies)
    return found & legal_mask(bodies, model, train, world_size, LEGAL)
