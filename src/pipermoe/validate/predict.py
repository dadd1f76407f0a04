"""The step time of a recipe by the resource model, and what its busiest pipeline rank spends it on."""

from __future__ import annotations

from dataclasses import dataclass

from pipermoe.resources.hidden_sync import hide_sync
from pipermoe.resources.step import placement_of, step_costs, step_seconds_by_term
from pipermoe.specs.report import Term
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.validate.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a step, and the seconds by term of the pipeline rank that computes the longest."""

    step_seconds: float
    terms: dict[Term, float]


def predict_step(recipe: Recipe) -> Prediction:
    """The simulated step; published stacks reduce gradients and gather weights beside computation."""
    table = StrategyTable.of([recipe.strategy])
    costs = step_costs(recipe.model, recipe.platform, recipe.train, table)
    costs = hide_sync(costs, recipe.train, table, placement_of(recipe.model, table).stages_of)
    seconds, ranks = step_seconds_by_term(recipe.platform, recipe.train, recipe.strategy, costs)
    return Prediction(seconds, max(ranks, key=lambda terms: terms["forward"] + terms["backward"]))
