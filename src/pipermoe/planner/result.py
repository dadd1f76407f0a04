"""What the planner found: the ranked strategies, the counts of the search, and the explanation."""

from __future__ import annotations

from typing import Literal

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
    """A strategy that differs from the chosen one in what `change` says, and what that costs.

    It is slower by `slower_seconds` (below 0: faster) and holds `more_bytes`. What does not fit lacks `missing_bytes`
    on `rank`, most of it for `category`; what fits loses or wins most by `term`. It `runs` where the plan has to.
    """

    change: str
    strategy: Strategy
    runs: bool
    fits: bool
    rank: int
    missing_bytes: int = 0
    category: MemoryCategory | None = None
    more_bytes: int = 0
    slower_seconds: float = 0.0
    term: Term | None = None
    term_seconds: float = 0.0


# What a step can be up against. "memory" is the time that a strategy which does not fit would save.
Wall = Literal["compute", "communication", "bubble", "memory", "imbalance", "host"]


class Finding(Frozen):
    """One of the paper's four bottlenecks in this plan: what is there of it, and the seconds that removing it saves."""

    name: str
    sentence: str
    seconds: float


class WhatIf(Frozen):
    """The chosen strategy, or with `strategy` another, with one thing changed: step, tokens/s against now, memory.

    `way` is the option or command that does it; empty where it takes another machine.
    """

    name: str
    step_seconds: float
    gain: float
    peak_bytes: int
    fits: bool
    strategy: Strategy | None = None
    way: str = ""


class Explanation(Frozen):
    """Why this strategy takes what it takes. `parts` are mean seconds of a rank and add up to the step."""

    parts: dict[str, float]
    walls: dict[Wall, float]
    wall: Wall
    verdict: str
    findings: tuple[Finding, ...]
    alternatives: tuple[Alternative, ...]
    what_ifs: tuple[WhatIf, ...]


class ErrorBand(Frozen):
    """How far predicted steps are from measured ones on machines of this class: median |relative error|, and where."""

    error: float
    source: str


class SearchCounts(Frozen):
    """Where the strategies of the search space went; `considered` is the sum of the others.

    `pruned` were never simulated because their lower bound already exceeds the best step.
    """

    considered: int
    illegal: int
    redundant: int
    not_fitting: int
    pruned: int
    simulated: int


class Campaign(Frozen):
    """So many tokens from first to last: seconds with failures and checkpoints, and what they cost."""

    tokens: float
    seconds: float
    goodput: float
    failures: float
    checkpoint_interval_seconds: float
    device_hours: float
    cost: float | None = None


class PlanningResult(Frozen):
    """The answer to `pipermoe plan` and `pipermoe predict` (nothing searched: no `counts`), ready for text or JSON."""

    model: ModelSpec
    platform: str
    train: TrainConfig
    world_size: int
    compute_slots: float
    memory_budget_bytes: int
    headroom: float
    imbalance: float
    objective: str
    parameters: int
    active_parameters: int
    counts: SearchCounts | None
    search_seconds: float
    ranked: tuple[Candidate, ...]
    error_band: ErrorBand
    explanation: Explanation
    campaign: Campaign | None = None
    pareto: tuple[Candidate, ...] = ()
    plan: Plan

    @property
    def chosen(self) -> Candidate:
        return self.ranked[0]

    @property
    def ties(self) -> int:
        """How many of the ranked are within the model's error of the chosen one, itself included."""
        limit = self.chosen.step_seconds * (1 + self.error_band.error)
        return sum(row.step_seconds <= limit for row in self.ranked)
