"""Every policy: one small file each, one line each in the table below."""

from __future__ import annotations

from pipermoe.layout.policies.balanced import Balanced
from pipermoe.layout.policies.eplb import Eplb
from pipermoe.layout.policies.heap import HeapReplicas
from pipermoe.layout.policies.hill_climbing import HillClimbing, Swaps
from pipermoe.layout.policies.incremental import Incremental
from pipermoe.layout.policies.proportional import Proportional
from pipermoe.layout.policies.sharding import HeterogeneousSharding
from pipermoe.layout.policies.sparse import SparseMaterialisation
from pipermoe.layout.policies.static import Static
from pipermoe.layout.policy import Policy

POLICIES: dict[str, Policy] = {
    "static": Static(),
    "hill-climbing": HillClimbing(),
    "swaps": Swaps(),
    "balanced": Balanced(),
    "incremental": Incremental(),
    "proportional": Proportional(),
    "sharding": HeterogeneousSharding(),
    "sparse": SparseMaterialisation(),
    "heap": HeapReplicas(),
    "eplb": Eplb(),
}
