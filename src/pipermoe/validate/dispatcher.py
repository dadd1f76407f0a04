"""How many rows a dispatcher sends that knows where a token's experts lie, for one that a plain all-to-all sends.

DeepEP and HybridEP (arXiv 2603.07685, section 5) send a token once to every node, and inside a node once to every rank,
that holds any of its experts; NCCL's all-to-all sends a row for every expert.
"""

from __future__ import annotations

from pipermoe.specs.model import MixtureOfExperts
from pipermoe.specs.network import INSIDE_A_NODE
from pipermoe.specs.platform import Platform

SENDS_ONCE = ("deepep", "hybridep")


def copies_per_row(
    platform: Platform, moe: MixtureOfExperts, expert_parallel: int, dispatcher: str
) -> dict[str, float]:
    """By level: expected copies sent over it / rows sent by a plain all-to-all, for independently chosen experts."""
    if dispatcher not in SENDS_ONCE:
        return {}
    inside = [level for level in platform.levels if level.link and level.link.topology in INSIDE_A_NODE]
    nodes = max(1, expert_parallel // inside[-1].ranks)
    reachable = min(nodes, moe.router.top_k_groups * -(-nodes // moe.router.num_groups))  # group-limited routing
    return {
        level.name: distinct(moe.top_k, expert_parallel if level in inside else reachable) / moe.top_k
        for level in platform.levels
    }


def distinct(choices: int, places: int) -> float:
    """The expected number of different places among `choices` independent ones: n (1 - (1 - 1/n)^k)."""
    return places * (1 - (1 - 1 / places) ** choices)
