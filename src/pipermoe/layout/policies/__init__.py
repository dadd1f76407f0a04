"""Every policy: one small file each, one line each in the table below; `co-activation` needs the routes of a trace."""

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


def policies_for(trace: Trace) -> dict[str, Policy]:
    """All policies; with the routes of a trace also the one that reads them."""
    if trace.routes_TLK is None:
        return POLICIES
    return {**POLICIES, "co-activation": NodeFirst(trace.planning_routes)}
