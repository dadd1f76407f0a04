"""The best strategy of many jobs: over ranks, batches, sequences, experts, or machines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Unpack

from pipermoe.planner.candidate import candidate
from pipermoe.planner.find import searched
from pipermoe.planner.job import Limits
from pipermoe.planner.result import Candidate
from pipermoe.planner.search import Field
from pipermoe.specs.base import Frozen
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes import Choice
from pipermoe.specs.train import TrainConfig

Value = int | str


class Case(Frozen):
    """One job of a sweep: its place on the axes, and the best strategy or why there is none."""

    values: dict[str, Value]
    world_size: int
    best: Candidate | None = None
    reason: str = ""

    @property
    def tokens_per_second_per_rank(self) -> float:
        return self.best.tokens_per_second / self.world_size if self.best else 0.0


class Sweep(Frozen):
    """All cases; `axes` are those with more than one value, in the order of the table."""

    model: str
    title: str
    axes: tuple[str, ...]
    cases: tuple[Case, ...]


def sweep(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    axes: Mapping[str, Sequence[int]],
    *,
    runtime: Choice = "pipermoe",
    **limits: Unpack[Limits],
) -> Sweep:
    """Plan every combination of `axes`: "ranks" and, where given, "global_batch", "seq_len", "experts"."""
    search = partial(searched, runtime=runtime, **limits)
    cases = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        size, spec, task = point["ranks"], _with_experts(model, point.get("experts")), _with_job(train, point)
        cases.append(_case({**point}, size, partial(search, spec, platform, task, size)))
    varying = tuple(axis for axis, values in axes.items() if len(values) > 1) or ("ranks",)
    return Sweep(model=model.name, title=f"{model.name} on {platform.name}", axes=varying, cases=tuple(cases))


def compare_platforms(
    model: ModelSpec,
    platforms: Sequence[Platform],
    train: TrainConfig,
    ranks: Sequence[int],
    *,
    precision: str | None = None,
    runtime: Choice = "pipermoe",
    **limits: Unpack[Limits],
) -> Sweep:
    """Plan the same job on every machine, each in `precision` or the one that is usual on it."""
    search = partial(searched, runtime=runtime, **limits)
    cases = []
    for platform, size in itertools.product(platforms, ranks):
        task = train.model_copy(update={"precision": precision or platform.usual_precision})
        values: dict[str, Value] = {"platform": platform.name, "ranks": size}
        cases.append(_case(values, size, partial(search, model, platform, task, size)))
    axes = ("platform", *(["ranks"] if len(ranks) > 1 else []))
    return Sweep(model=model.name, title=f"{model.name}, {_sizes(ranks)} ranks", axes=axes, cases=tuple(cases))


def _sizes(ranks: Sequence[int]) -> str:
    return ", ".join(f"{size:,}" for size in ranks)


def _case(values: dict[str, Value], world_size: int, search: Callable[[], Field]) -> Case:
    try:
        field = search()
    except UserError as error:
        return Case(values=values, world_size=world_size, reason=str(error))
    ranking = field.best()
    if not ranking.best:
        return Case(values=values, world_size=world_size, reason="nothing fits")
    job, strategy = field.job, field.space.strategy(ranking.best[0].place)
    return Case(values=values, world_size=world_size, best=candidate(job, strategy))


def _with_experts(model: ModelSpec, experts: int | None) -> ModelSpec:
    """The model with another number of routed experts; choices per token stay."""
    if experts is None:
        return model
    if experts < model.moe.top_k:
        raise UserError(f"--experts = {experts}: {model.name} chooses {model.moe.top_k} of them for every token")
    return model.model_copy(update={"moe": model.moe.model_copy(update={"num_experts": experts})})


def _with_job(train: TrainConfig, point: Mapping[str, int]) -> TrainConfig:
    keys = {"global_batch": "global_batch_size", "seq_len": "seq_len"}
    return train.model_copy(update={key: point[axis] for axis, key in keys.items() if axis in point})
