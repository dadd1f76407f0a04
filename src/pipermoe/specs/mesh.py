"""Which rank stands where: the coordinates of a rank and the groups it communicates in. One mapping, read by all.

A stage has places 0 to N-1, tensor parallelism innermost: attention `dp, cp, tp`, experts `edp, ep, etp`. A strategy's
`rank_order` says how the places of all stages become ranks:

- "dp-pp": the pipeline is outermost, so a stage is N consecutive ranks.
- "pp-dp": the pipeline stands inside data parallelism. A stage is cut into runs of `stage_stride` places, the
  fewest that hold whole groups of tp, cp, etp and ep; the first runs of all stages come first, then all second ones,
  and so on. So what exchanges within a layer lies as close as ever, the stages of a pipeline lie near each other, and
  what the runs repeat lies far apart: replicas of dense parameters and of experts.

Both arrangements share their stages (folding) and no run cuts an expert group, so experts on all ranks of a stage (the
paper's ep = dp) have one order only. Where tp * cp = etp * ep, "pp-dp" is Megatron's `tp-cp-ep-pp-dp`
(--use-tp-pp-dp-mapping), which it has for such strategies alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pipermoe.specs.strategy import Strategy

Axis = Literal["pp", "dp", "cp", "tp", "edp", "ep", "etp", "stage", "ends", "ep_across", "ep_inside"]
DENSE_AXES: tuple[Axis, ...] = ("dp", "cp", "tp")
EXPERT_AXES: tuple[Axis, ...] = ("edp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands on every axis of both arrangements."""

    pp: int
    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int


def coordinates(strategy: Strategy, rank: int) -> Coordinates:
    """The coordinates of `rank`, 0 <= rank < world size."""
    if not 0 <= rank < strategy.world_size:
        raise ValueError(f"rank {rank} is outside of 0..{strategy.world_size - 1}")
    stride = strategy.stage_stride
    run, rest = divmod(rank, strategy.pipeline_parallel * stride)
    pp, rest = divmod(rest, stride)
    place = run * stride + rest
    dp, rest = divmod(place, strategy.context_parallel * strategy.tensor_parallel)
    cp, tp = divmod(rest, strategy.tensor_parallel)
    edp, rest = divmod(place, strategy.expert_parallel * strategy.expert_tensor_parallel)
    ep, etp = divmod(rest, strategy.expert_tensor_parallel)
    return Coordinates(pp, dp, cp, tp, edp, ep, etp)


def pipeline_ranks(strategy: Strategy) -> list[int]:
    """The coordinate `pp` of every rank."""
    stride = strategy.stage_stride
    return [rank // stride % strategy.pipeline_parallel for rank in range(strategy.world_size)]


def groups(strategy: Strategy, axis: Axis) -> list[tuple[int, ...]]:
    """All rank groups along `axis`, each in the order of its coordinate; together they hold every rank once.

    "dp" and "edp" are the ranks that hold the same parameters: where every stage has two homes, those of both.
    The axis "stage" is all ranks of one pipeline stage (dp x cp x tp, equally edp x ep x etp), "ends" the first and the
    last rank of a pipeline, each rank between them alone. A group along "ep" falls into blocks of `ranks_per_copy`:
    "ep_inside" is such a block, "ep_across" those that stand at the same place in every block.
    """
    if axis in ("ep_inside", "ep_across"):
        block = strategy.ranks_per_copy
        blocks = [
            [group[start : start + block] for start in range(0, len(group), block)] for group in groups(strategy, "ep")
        ]
        return [ranks for group in blocks for ranks in (group if axis == "ep_inside" else zip(*group, strict=True))]
    if axis == "ends":
        pipelines = groups(strategy, "pp")
        between = [(rank,) for pipeline in pipelines for rank in pipeline[1:-1]]
        return [(first, *rest[-1:]) for first, *rest in pipelines] + between
    if axis == "stage":
        varying = DENSE_AXES
        family: tuple[Axis, ...] = ("pp", *DENSE_AXES)
    else:
        varying = (axis,)
        family = ("pp", *(EXPERT_AXES if axis in EXPERT_AXES else DENSE_AXES))
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(strategy.world_size):
        here = coordinates(strategy, rank)
        if strategy.stage_homes > 1 and axis in ("dp", "edp"):
            here = replace(here, pp=min(here.pp, strategy.pipeline_parallel - 1 - here.pp))
        key = tuple(getattr(here, name) for name in family if name not in varying)
        members.setdefault(key, []).append(rank)
    return [tuple(ranks) for ranks in members.values()]


def group_of(strategy: Strategy, axis: Axis, rank: int) -> tuple[int, ...]:
    """The ranks that `rank` communicates with along `axis`, itself included."""
    return next(ranks for ranks in groups(strategy, axis) if rank in ranks)


def split_layers(num_layers: int, stages: int, layer_split: tuple[int, ...] = ()) -> list[range]:
    """The consecutive layers of every stage: as `layer_split` says, else as even as possible, longer stages first."""
    if layer_split:
        if len(layer_split) != stages or sum(layer_split) != num_layers:
            raise ValueError(
                f"layer_split = {list(layer_split)} must give {stages} stages with {num_layers} layers in all"
            )
        sizes = list(layer_split)
    else:
        if stages > num_layers:
            raise ValueError(f"{stages} stages need at least as many layers; the model has {num_layers}")
        base, longer = divmod(num_layers, stages)
        sizes = [base + (stage < longer) for stage in range(stages)]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
