"""Every named schedule: one small function each, one line each in the table below."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders.flush import gpipe, one_f_one_b
from pipermoe.specs.errors import UserError, describe_value


@dataclass(frozen=True, slots=True)
class Recipe:
    """A builder `(pipeline_parallel, microbatches, virtual_stages) -> Schedule` and the arguments it accepts."""

    build: Callable[[int, int, int], Schedule]
    virtual_stages: tuple[int, int | None] = (1, 1)  # least and most model chunks per rank; None: any number


RECIPES: dict[str, Recipe] = {
    "gpipe": Recipe(gpipe),
    "1f1b": Recipe(one_f_one_b),
}


def build(name: str, pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """The schedule `name` for `pipeline_parallel` ranks of `virtual_stages` model chunks each.

    Raises UserError when the name is unknown or the schedule does not exist for these numbers; the message names the
    rule and the nearest legal value.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        close = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.4)
        hint = f"nearest: {', '.join(close)}; " if close else ""
        raise UserError(describe_value("", "schedule", name, f"unknown; {hint}known: {', '.join(RECIPES)}"))
    for key, value in (("pipeline_parallel", pipeline_parallel), ("microbatches", microbatches)):
        if value < 1:
            raise UserError(describe_value("", key, value, "must be at least 1; nearest: 1"))
    least, most = recipe.virtual_stages
    if virtual_stages < least or (most is not None and virtual_stages > most):
        accepted = f"exactly {least}" if least == most else f"at least {least}"
        nearest = least if virtual_stages < least else most
        rule = f"{name} needs {accepted} per pipeline rank; nearest: {nearest}"
        raise UserError(describe_value("", "virtual_stages", virtual_stages, rule))
    return recipe.build(pipeline_parallel, microbatches, virtual_stages)
