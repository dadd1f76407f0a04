"""A policy on a trace: planned on the loads so far, met by the loads that follow."""

# W steps, L MoE layers, E logical experts

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import cross_node_share, imbalance, least_imbalance, nodes_per_token, rank_load
from pipermoe.layout.policy import Nodes, Policy
from pipermoe.layout.popularity import fit_popularity
from pipermoe.layout.trace import Trace
from pipermoe.layout.transfer import busiest_arrivals, moved_copies
from pipermoe.specs.base import Frozen


class Replay(Frozen):
    """What a policy did on a trace. Imbalance is the busiest rank's rows over the mean, 1 is perfect.

    `planned`: on the loads that were planned for; `met`: on those that followed, mean over steps and layers; `p95`: one
    in twenty of these is above; `worst_layer`: the highest mean over steps of a layer; `imbalance`: the mean over
    layers of every step that was met. `cross_node` is the share of rows that leave their node; `nodes_per_token` is of
    routes that no policy has seen. `moves` are copies a layer and re-plan after the first, `first_moves` those of the
    first; `arrivals` are the moves to the rank that receives the most; `held` are the copies of the rank that holds the
    most at the end, mean over layers; `plan_ms` is CPU time of planning all layers.
    """

    policy: str
    planned: float
    met: float
    p95: float
    worst_layer: float
    cross_node: float
    nodes_per_token: float | None
    first_moves: float
    moves: float
    arrivals: float
    held: float
    plan_ms: float
    imbalance: tuple[float, ...]


class Comparison(Frozen):
    """Several policies on one trace. `bound` is the imbalance that no layout of so many slots goes below, mean over the
    steps that were met; `sigma` and the two R squared are of `fit_popularity` on their sum.
    """

    trace: str
    steps: int
    layers: int
    experts: int
    ranks: int
    nodes: int
    slots: int
    every: int
    window: int
    bound: float
    sigma: float
    r2_log_normal: float
    r2_zipf: float
    policies: tuple[Replay, ...]


def compare_policies(
    trace: Trace, policies: Mapping[str, Policy], *, ranks: int, nodes: int, slots: int, every: int, window: int
) -> Comparison:
    """Replay every policy from the static layout. Raises `ValueError` where the experts do not fit."""
    steps, layers, experts = trace.shape
    layout, arranged = ExpertLayout.static(layers, ranks, experts, slots), Nodes(ranks, ranks // nodes)
    met_WLE = np.concatenate([following for _, following in stretches(trace.load_WLE, every, window)])
    return Comparison(
        trace=trace.name,
        steps=steps,
        layers=layers,
        experts=experts,
        ranks=ranks,
        nodes=nodes,
        slots=slots,
        every=every,
        window=window,
        **asdict(fit_popularity(met_WLE.sum(0))),
        bound=float(least_imbalance(met_WLE.reshape(-1, experts), ranks, slots).mean()),
        policies=tuple(
            replay(name, policy, trace, layout, arranged, every=every, window=window)
            for name, policy in policies.items()
        ),
    )


def replay(
    name: str, policy: Policy, trace: Trace, layout: ExpertLayout, nodes: Nodes, *, every: int, window: int
) -> Replay:
    """Re-plan every `every` steps for the mean load of the last `window`; the first plan follows the first window.

    A trace of one step is planned for and met by the same load.
    """
    met, planned, crossing, moves, arrivals, seconds = [], [], [], [], [], []
    for forecast_LE, following_WLE in stretches(trace.load_WLE, every, window):
        began = time.process_time()
        after = policy.plan(layout, forecast_LE, nodes)
        seconds.append(time.process_time() - began)
        moves.append(moved_copies(layout, after).mean())
        arrivals.append(busiest_arrivals(layout, after))
        layout = after
        planned.append(imbalance(rank_load(layout, forecast_LE)).mean())
        met += [imbalance(rank_load(layout, load_LE)) for load_LE in following_WLE]
        crossing.append(cross_node_share(layout, following_WLE.sum(0), nodes).mean())
    met_WL = np.stack(met)
    routes_TLK = trace.unseen_routes
    visited = None if routes_TLK is None else float(nodes_per_token(layout, routes_TLK, nodes).mean())
    return Replay(
        policy=name,
        planned=float(np.mean(planned)),
        met=float(met_WL.mean()),
        p95=float(np.quantile(met_WL, 0.95)),
        worst_layer=float(met_WL.mean(0).max()),
        cross_node=float(np.mean(crossing)),
        nodes_per_token=visited,
        first_moves=float(moves[0]),
        moves=float(np.mean(moves[1:] or [0.0])),
        arrivals=float(np.mean(arrivals[1:] or [0.0])),
        held=float(layout.copies_LNE.sum((0, 2)).max() / len(layout.slots_LNS)),
        plan_ms=1e3 * float(np.mean(seconds)),
        imbalance=tuple(met_WL.mean(1).tolist()),
    )


def stretches(load_WLE: NDArray[np.int64], every: int, window: int) -> list[tuple[NDArray, NDArray]]:
    """(forecast (L, E), loads that follow (W, L, E)) of every re-plan."""
    if len(load_WLE) == 1:
        return [(load_WLE[0], load_WLE)]
    window = min(window, len(load_WLE) - 1)
    return [
        (np.rint(load_WLE[start - window : start].mean(0)).astype(np.int64), load_WLE[start : start + every])
        for start in range(window, len(load_WLE), every)
    ]
