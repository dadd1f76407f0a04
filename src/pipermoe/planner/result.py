"""What the planner found: the ranked strategies, the counts of the search, and why the others lose."""

from __future__ import annotations

from pipermoe.specs.base import Frozen
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.report import MemoryCategory, Term
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


class Candidate(Frozen):
    """One strategy with its exact cost under the model. Terms are means over ranks and add up to the step."""

    strategy: Strategy
    microbatches: int
    step_seconds: float
    tokens_per_second: float
    model_flops_utilization: float
    seconds: dict[Term, float]
    worst_rank: int
    peak_bytes: int
    memory_bytes: dict[MemoryCategory, int]


class Alternative(Frozen):
    """The best strategy that differs from the chosen one on an axis, and why it loses; `axes` are those it stands for.

    Either it does not fit: `missing_bytes` on `rank`. Or it is slower by `slower_seconds`, most of all by `term`.
    """

    axes: tuple[str, ...]
    strategy: Strategy
    fits: bool
    rank: int
    missing_bytes: int = 0
    category: MemoryCategory | None = None
    slower_seconds: float = 0.0
    term: Term | None = None
    term_seconds: float = 0.0


class SearchCounts(Frozen):
    """Where the strategies of the search space went; `considered` is the sum of the others.

    `pruned` were never simulated because their lower bound already exceeds the last strategy of the ranking.
    """

    considered: int
    illegal: int
    redundant: int
    not_fitting: int
    pruned: int
    simulated: int


class PlanningResult(Frozen):
    """The answer to `pipermoe plan`, complete enough to be rendered or written as JSON."""

    model: ModelSpec
    platform: str
    train: TrainConfig
    world_size: int
    compute_slots: float
    memory_budget_bytes: int
    parameters: int
    counts: SearchCounts
    search_seconds: float
    ranked: tuple[Candidate, ...]
    bottleneck: str
    alternatives: tuple[Alternative, ...]
    plan: Plan

    @property
    def chosen(self) -> Candidate:
        return self.ranked[0]
