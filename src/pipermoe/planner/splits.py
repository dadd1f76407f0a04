"""Cutting the layers into stages so that the longest stage is as short as can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.axes import divisors
from pipermoe.resources.stages import stage_shapes
from pipermoe.resources.unit_seconds import Work, columns, unit_seconds
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

Split = tuple[int, ...]


def balanced_splits(model: ModelSpec, platform: Platform, train: TrainConfig, world_size: int) -> tuple[Split, ...]:
    """For every number of stages the balanced split, () where the even one is as good; [0] is ().

    Seconds are those of one sequence with experts spread as far as ranks and experts allow: what counts is how the two
    kinds of layers, the embedding and the head compare.
    """
    spread = max(n for n in divisors(model.moe.num_experts) if world_size % n == 0)
    reference = StrategyTable.of([Strategy(data_parallel=spread, expert_parallel=spread)])
    [price] = unit_seconds(model, platform, train, reference)
    part = np.sum([price[columns(work)] for work in Work], axis=0)
    whole = stage_shapes(model, model.num_layers)  # a stage of every layer
    seconds = (np.stack([getattr(whole, name) for name in whole.__slots__], axis=1) @ part).tolist()
    sums = consecutive_sums(seconds)
    return tuple(_unless_even(seconds, sums, stages) for stages in range(model.num_layers + 1))


def consecutive_sums(seconds: Sequence[float]) -> NDArray[np.float64]:
    """The sums of all stretches of consecutive layers, ascending."""
    return np.sort(np.concatenate([np.cumsum(seconds[first:]) for first in range(len(seconds))]))


def _unless_even(seconds: Sequence[float], sums: NDArray[np.float64], stages: int) -> Split:
    if stages < 2:
        return ()
    even = tuple(map(len, split_layers(len(seconds), stages)))
    balanced = balanced_split(seconds, sums, stages)
    return balanced if _longest(seconds, balanced) < _longest(seconds, even) else ()


def balanced_split(seconds: Sequence[float], sums: NDArray[np.float64], stages: int) -> Split:
    """The layers of every stage, at least one each, such that the longest of the stages is as short as possible.

    A limit is enough if filling stages up to it, one after the other, takes no more of them; the least that is enough
    is one of the `sums` of consecutive layers.
    """
    low, high = 0, len(sums) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(list(_filled(seconds, stages, sums[middle]))) <= stages else (middle + 1, high)
    return tuple(_filled(seconds, stages, sums[low]))


def _filled(seconds: Sequence[float], stages: int, limit: float) -> Iterator[int]:
    """Layers of the stages filled up to `limit`, leaving one for each of `stages`."""
    held, taken = 0, 0.0
    for layer, each in enumerate(seconds):
        stages_left = stages - 1
        if held and (taken + each > limit or len(seconds) - layer <= stages_left):
            yield held
            held, taken, stages = 0, 0.0, stages_left
        held, taken = held + 1, taken + each
    yield held


def _longest(seconds: Sequence[float], split: Split) -> float:
    ends = np.cumsum(split)
    return max(sum(seconds[end - size : end]) for end, size in zip(ends, split, strict=True))
