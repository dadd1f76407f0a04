"""Finding the best strategy: `find_plan`."""

from pipermoe.planner.find import find_plan
from pipermoe.planner.result import PlanningResult

__all__ = ["PlanningResult", "find_plan"]
