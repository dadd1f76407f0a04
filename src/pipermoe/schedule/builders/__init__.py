"""Every named schedule: one small function each, one line each in the table below."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders.dualpipe import dualpipe, dualpipe_v
from pipermoe.schedule.builders.flush import gpipe, one_f_one_b
from pipermoe.schedule.builders.looped import breadth_first, interleaved_1f1b
from pipermoe.schedule.builders.overlapped import overlapped, zb_h2_overlap, zb_v_overlap
from pipermoe.schedule.builders.vshape import v_half, v_half_overlap, v_min, zb_v
from pipermoe.schedule.builders.zero_bubble import zb_h1, zb_h2
from pipermoe.schedule.torch_csv import read_csv
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.strategy import Strategy

Builder = Callable[[int, int, int], Schedule]  # (pipeline_parallel, microbatches, virtual_stages)
Homes = tuple[tuple[int, ...], ...]  # the stages of every rank, ascending


def _in_a_loop(pipeline_parallel: int, virtual_stages: int) -> Homes:
    """Round after round over the ranks; with one chunk per rank, one stage each."""
    stages = pipeline_parallel * virtual_stages
    return tuple(tuple(range(rank, stages, pipeline_parallel)) for rank in range(pipeline_parallel))


def _in_a_v(pipeline_parallel: int, virtual_stages: int) -> Homes:
    return tuple((rank, 2 * pipeline_parallel - 1 - rank) for rank in range(pipeline_parallel))


def _mirrored(pipeline_parallel: int, virtual_stages: int) -> Homes:
    pairs = ((rank, pipeline_parallel - 1 - rank) for rank in range(pipeline_parallel))
    return tuple((min(pair), max(pair)) for pair in pairs)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A builder and the arguments it accepts."""

    build: Builder
    virtual_stages: tuple[int, int | None] = (1, 1)  # least and most model chunks per rank; None: any number
    ranks_step: int = 1  # pipeline_parallel must be a multiple of this
    microbatches_step: int = 1  # the number of micro-batches must be a multiple of this
    microbatches_per_rank: int = 0  # and at least this times pipeline_parallel
    homes: Callable[[int, int], Homes] = _in_a_loop  # (pipeline_parallel, virtual_stages)


def _beside(builder: Builder) -> Builder:
    return lambda pipeline_parallel, microbatches, virtual_stages: overlapped(
        builder(pipeline_parallel, microbatches, virtual_stages)
    )


_LOOP, _V = (2, None), (2, 2)

# GPipe and breadth-first finish all forwards before the first backward: nothing could run beside another. V-Min slowed
# down to the pace of one pair per micro-batch is V-Half: v-half-overlap is its overlapped variant, too.
RECIPES: dict[str, Recipe] = {
    "gpipe": Recipe(gpipe),
    "1f1b": Recipe(one_f_one_b),
    "1f1b-overlap": Recipe(_beside(one_f_one_b)),
    "breadth-first": Recipe(breadth_first, _LOOP),
    "interleaved-1f1b": Recipe(interleaved_1f1b, _LOOP),
    "interleaved-1f1b-overlap": Recipe(_beside(interleaved_1f1b), _LOOP),
    "zb-h1": Recipe(zb_h1),
    "zb-h2": Recipe(zb_h2),
    "zb-h1-overlap": Recipe(_beside(zb_h1)),
    "zb-h2-overlap": Recipe(zb_h2_overlap),
    "zb-v": Recipe(zb_v, _V, homes=_in_a_v),
    "zb-v-overlap": Recipe(zb_v_overlap, _V, microbatches_per_rank=2, homes=_in_a_v),
    "v-half": Recipe(v_half, _V, homes=_in_a_v),
    "v-half-overlap": Recipe(v_half_overlap, _V, homes=_in_a_v),
    "v-min": Recipe(v_min, _V, homes=_in_a_v),
    "dualpipe": Recipe(dualpipe, ranks_step=2, microbatches_step=2, microbatches_per_rank=2, homes=_mirrored),
    "dualpipe-v": Recipe(dualpipe_v, _V, microbatches_per_rank=2, homes=_in_a_v),
}


MOST_FORWARDS = 500_000  # beyond it a schedule takes minutes and gigabytes, and no machine has such a pipeline


@lru_cache(maxsize=16)  # the pipelines that a plan compares, each looked at many times
def build(name: str, pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """The schedule `name` for `pipeline_parallel` ranks of `virtual_stages` model chunks each.

    Raises UserError when the name is unknown or the schedule does not exist for these numbers; the message names the
    rule and the nearest legal values.
    """
    rule = illegal(name, pipeline_parallel, microbatches, virtual_stages)
    if rule:
        raise UserError(rule)
    return RECIPES[name].build(pipeline_parallel, microbatches, virtual_stages)


def schedule_of(strategy: Strategy, global_batch_size: int) -> Schedule:
    """The schedule that `strategy` names. Raises UserError as `build` does."""
    microbatches = strategy.microbatches(global_batch_size)
    return build(strategy.schedule, strategy.pipeline_parallel, microbatches, strategy.virtual_stages)


def build_or_read(
    name_or_file: str, pipeline_parallel: int, microbatches: int, virtual_stages: int | None = None
) -> Schedule:
    """`build`, by default with the fewest chunks per rank; or a schedule from a .csv file, which brings its numbers."""
    if name_or_file.endswith(".csv"):
        return read_csv(Path(name_or_file))
    if virtual_stages is None:
        virtual_stages = RECIPES[name_or_file].virtual_stages[0] if name_or_file in RECIPES else 1
    return build(name_or_file, pipeline_parallel, microbatches, virtual_stages)


def illegal(name: str, pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> str | None:
    """Why the schedule does not exist for these numbers, with the nearest legal values; None if it does."""
    found = problem(name, pipeline_parallel, microbatches, virtual_stages)
    return describe_value("", *found) if found else None


def problem(
    name: str, pipeline_parallel: int, microbatches: int, virtual_stages: int = 1
) -> tuple[str, object, str] | None:
    """What `illegal` says, as (key, value, rule and way out)."""
    recipe = RECIPES.get(name)
    if recipe is None:
        close = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.4)
        hint = f"nearest: {', '.join(close)}; " if close else ""
        return "schedule", name, f"unknown; {hint}known: {', '.join(RECIPES)}"
    least, most = recipe.virtual_stages
    if virtual_stages < least or (most is not None and virtual_stages > most):
        count = f"exactly {least}" if least == most else f"at least {least}"
        rule = f"{name} needs {count} per pipeline rank; nearest: {least if virtual_stages < least else most}"
        return "virtual_stages", virtual_stages, rule
    least = recipe.microbatches_per_rank * pipeline_parallel
    found = _not_a_multiple(name, "pipeline_parallel", pipeline_parallel, recipe.ranks_step, 1) or _not_a_multiple(
        name, "microbatches", microbatches, recipe.microbatches_step, least
    )
    stages = pipeline_parallel * virtual_stages
    if not found and stages * microbatches > MOST_FORWARDS:
        rule = f"stages * microbatches may be {MOST_FORWARDS:,} at most; nearest: {MOST_FORWARDS // stages}"
        return "microbatches", microbatches, rule
    return found


def _not_a_multiple(name: str, key: str, value: int, step: int, least: int) -> tuple[str, object, str] | None:
    """Why `value` is not a positive multiple of `step` of at least `least`; None if it is."""
    least = max(-(-least // step) * step, step)
    if value >= least and value % step == 0:
        return None
    below, above = value // step * step, value // step * step + step
    nearest = f"{below}, {above}" if below >= least else f"{max(least, above if value >= least else least)}"
    rule = "a multiple of " + str(step) + " and " if step > 1 else ""
    return key, value, f"{name} needs {rule}at least {least}; nearest: {nearest}"
