"""The peak and the simulated step of strategies of a space, each worked out once, whatever asks for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.exact import simulated_seconds
from pipermoe.planner.job import Job
from pipermoe.planner.space import Space
from pipermoe.resources.peak import peak_bytes
from pipermoe.specs.strategy_table import StrategyTable

Places = NDArray[np.int64]
Figures = NDArray[np.float64]


class Judge:
    """Neither figure depends on the memory budget, so the searches for different budgets share them."""

    def __init__(self, job: Job, space: Space) -> None:
        self.job, self.space = job, space
        self._peaks: dict[int, float] = {}
        self._seconds: dict[int, float] = {}

    def peaks(self, places: Places) -> Figures:
        """Bytes of the worst rank of each place."""
        job = self.job
        return self._known(self._peaks, places, lambda t: peak_bytes(job.model, job.train, t, imbalance=job.imbalance))

    def seconds(self, places: Places) -> Figures:
        """The simulated step of each place."""
        return self._known(self._seconds, places, lambda t: simulated_seconds(self.job, t))

    def at_least(self, places: Places) -> Figures:
        """The simulated step where it is known, 0 where it is not."""
        return np.array([self._seconds.get(place, 0.0) for place in places.tolist()])

    def _known(self, known: dict[int, float], places: Places, ask: Callable[[StrategyTable], Figures]) -> Figures:
        new = [place for place in places.tolist() if place not in known]
        if new:
            known.update(zip(new, ask(self.space.table(np.array(new))).tolist(), strict=True))
        return np.array([known[place] for place in places.tolist()])
