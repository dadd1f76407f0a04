"""Every policy: one small file each, one line each in the table below. `policies_for` adds those that read a trace."""

from __future__ import annotations

from pipermoe.layout.policies.balanced import Balanced
from pipermoe.layout.policies.eplb import Eplb
from pipermoe.layout.policies.expand_shrink import ExpandShrink
from pipermoe.layout.policies.heap import HeapReplicas
from pipermoe.layout.policies.hill_climbing import HillClimbing, Swaps
from pipermoe.layout.policies.incremental import Incremental
from pipermoe.layout.policies.node_first import NodeFirst
from pipermoe.layout.policies.proportional import Proportional
from pipermoe.layout.policies.sharding import HeterogeneousSharding
from pipermoe.layout.policies.sparse import SparseMaterialisation
from pipermoe.layout.policies.static import Static
from pipermoe.layout.policies.two_stage import TwoStage
from pipermoe.layout.policy import Policy
from pipermoe.layout.trace import Trace

POLICIES: dict[str, Policy] = {
    "static": Static(),
    "hill-climbing": HillClimbing(),
    "swaps": Swaps(),
    "balanced": Balanced(),
    "incremental": Incremental(),
    "expand-shrink": ExpandShrink(),
    "node-first": NodeFirst(),
    "proportional": Proportional(),
    "sharding": HeterogeneousSharding(),
    "sparse": SparseMaterialisation(),
    "heap": HeapReplicas(),
    "eplb": Eplb(),
}
OFFLINE = ("two-stage",)  # minutes of integer programming: only where asked for by name


def policies_for(trace: Trace) -> dict[str, Policy]:
    """All policies for a trace, with those that are made for its routes."""
    made: dict[str, Policy] = {} if trace.routes_TLK is None else {"co-activation": NodeFirst(trace.planning_routes)}
    return {**POLICIES, **made, "two-stage": TwoStage(trace.planning_routes)}
