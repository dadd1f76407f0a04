"""Integer programs for placing experts, solved by HiGHS through scipy: slow, for small problems and for certificates.

MoETuner (arXiv 2502.06643) places in two of them: experts to clusters of even load, then the clusters of each layer to
ranks so that the heaviest flow between two ranks is least. One copy of each expert.
"""

# E logical experts, N ranks, S slots of a rank, C clusters (as many as ranks)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError

Objective = Literal["peak", "deviation"]


@dataclass(frozen=True, slots=True)
class Limits:
    """When HiGHS stops: after `seconds` for one program, or within `gap` of the optimum (the paper's tolerance)."""

    seconds: float = 10.0
    gap: float = 0.025


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Assigned:
    """The rank of every expert, or None if none was found in time; no assignment has an objective below `bound`."""

    rank_E: NDArray[np.int64] | None
    bound: float


def assign_experts(
    load_E: NDArray, ranks: int, slots: int, *, objective: Objective = "peak", limits: Limits = LIMITS
) -> Assigned:
    """Experts onto ranks, 1 to `slots` on each: the least load of the busiest rank, or the least sum over ranks of the
    distance from the mean (MoETuner, program 1).
    """
    experts = len(load_E)
    measured = 1 if objective == "peak" else ranks  # variables behind the ranks * experts binaries
    x = np.eye(ranks * experts).reshape(ranks, experts, ranks, experts)
    every_expert = x.sum(0).reshape(experts, -1)
    on_rank = x.sum(1).reshape(ranks, -1)
    rows_of_rank = (x * np.asarray(load_E, dtype=float)[None, :, None, None]).sum(1).reshape(ranks, -1)
    above = np.ones((ranks, 1)) if objective == "peak" else np.eye(ranks)
    mean = 0.0 if objective == "peak" else float(np.sum(load_E)) / ranks
    none = np.zeros((experts, measured))
    constraints = [
        (np.hstack([every_expert, none]), 1.0, 1.0),
        (np.hstack([on_rank, np.zeros((ranks, measured))]), 1.0, float(slots)),
        (np.hstack([rows_of_rank, -above]), -np.inf, mean),
    ]
    if objective == "deviation":
        constraints.append((np.hstack([-rows_of_rank, -above]), -np.inf, -mean))
    found, bound = _solve(ranks * experts, measured, constraints, limits)
    return Assigned(None if found is None else found.reshape(ranks, experts).argmax(0), bound)


def assign_clusters(flow_NC: NDArray, cost_NN: NDArray, *, limits: Limits = LIMITS) -> NDArray[np.int64]:
    """The rank of every cluster of a layer, (C,), a cluster for each rank: the least of the heaviest flows between two
    ranks (MoETuner, program 2, one hop given the hop before).

    `flow_NC` is what goes from each rank to each cluster, `cost_NN` the seconds of a unit from rank to rank.
    """
    ranks = len(flow_NC)
    y = np.eye(ranks * ranks).reshape(ranks, ranks, -1)  # cluster, rank
    flows = np.einsum("nc,nm,cmv->nmv", flow_NC, cost_NN, y).reshape(ranks * ranks, -1)
    zero = np.zeros((ranks, 1))
    constraints = [
        (np.hstack([y.sum(1), zero]), 1.0, 1.0),
        (np.hstack([y.sum(0), zero]), 1.0, 1.0),
        (np.hstack([flows, -np.ones((len(flows), 1))]), -np.inf, 0.0),
    ]
    found, _ = _solve(ranks * ranks, 1, constraints, limits)
    return np.arange(ranks) if found is None else found.reshape(ranks, ranks).argmax(1)


def _solve(binaries: int, measured: int, constraints: list[tuple], limits: Limits) -> tuple[NDArray | None, float]:
    """Least sum of the `measured` variables that follow the binaries: (the binaries, a bound of the objective)."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp  # pyright: ignore[reportMissingImports]
        from scipy.sparse import csr_array  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("integer programs need scipy: pip install 'pipermoe[exact]'") from None
    whole = np.repeat([1, 0], [binaries, measured])
    solved = milp(
        c=1 - whole,
        integrality=whole,
        bounds=Bounds(0, np.where(whole, 1, np.inf)),  # pyright: ignore[reportArgumentType]
        constraints=[LinearConstraint(csr_array(matrix), low, high) for matrix, low, high in constraints],
        options={"time_limit": limits.seconds, "mip_rel_gap": limits.gap},
    )
    bound = 0.0 if solved.mip_dual_bound is None else float(solved.mip_dual_bound)
    return (None if solved.x is None else np.rint(solved.x[:binaries])), bound
