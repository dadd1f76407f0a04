"""What a dispatcher makes of the links that knows where a token's experts lie: DeepEP and HybridEP.

They send a token once to every node, and inside a node once to every rank, that holds any of its experts (arXiv
2603.07685, section 5); NCCL's all-to-all sends a row for every expert. How much of a link they reach is measured.
"""

from __future__ import annotations

import math
from importlib import resources

from pydantic import Field

from pipermoe.resources.dispatch import expected_copies_per_token
from pipermoe.specs.base import Frozen
from pipermoe.specs.catalogue import names_in
from pipermoe.specs.documents import load
from pipermoe.specs.model import MixtureOfExperts
from pipermoe.specs.network import INSIDE_A_NODE, CollectiveRate, Link
from pipermoe.specs.platform import Evidence, Platform
from pipermoe.specs.units import BytesPerSecond


class MeasuredOn(CollectiveRate):
    """Rates that were measured on a link of this bandwidth."""

    bandwidth_bytes_per_s: BytesPerSecond


class Dispatcher(Frozen):
    """Shares of a link that it reaches, `inside` a node by the link's bandwidth (the nearest counts), or `between`."""

    name: str
    inside: tuple[MeasuredOn, ...] = Field(min_length=1)
    between: CollectiveRate
    evidence: Evidence

    def rate_on(self, link: Link) -> CollectiveRate:
        if link.topology not in INSIDE_A_NODE:
            return self.between
        return min(self.inside, key=lambda rate: abs(math.log(rate.bandwidth_bytes_per_s / link.bandwidth_bytes_per_s)))


def dispatch_rates(
    platform: Platform, moe: MixtureOfExperts, expert_parallel: int, dispatcher: str
) -> dict[str, CollectiveRate]:
    """By level: the share of the link at which rows of a plain all-to-all seem to travel; {} for a plain one."""
    if dispatcher not in names_in("dispatchers"):
        return {}
    with resources.as_file(resources.files("pipermoe") / "catalogue" / "dispatchers" / f"{dispatcher}.toml") as path:
        found = load(path, Dispatcher)
    copies = copies_per_row(platform, moe, expert_parallel)
    return {
        level.name: _sending(found.rate_on(level.link), copies[level.name]) for level in platform.levels if level.link
    }


def _sending(rate: CollectiveRate, copies: float) -> CollectiveRate:
    """The rate as seen by rows of which only `copies` are sent."""
    return CollectiveRate(
        size=rate.size,
        rate=tuple(share / copies for share in rate.rate),
        latency_seconds=rate.latency_seconds,
        latency_per_rank_seconds=rate.latency_per_rank_seconds,
    )


def copies_per_row(platform: Platform, moe: MixtureOfExperts, expert_parallel: int) -> dict[str, float]:
    """By level: expected copies sent over it / rows sent by a plain all-to-all, all sets of experts equally likely."""
    inside = [level for level in platform.levels if level.link and level.link.topology in INSIDE_A_NODE]
    nodes = max(1, expert_parallel // inside[-1].ranks)
    reachable = min(nodes, moe.router.top_k_groups * -(-nodes // moe.router.num_groups))  # group-limited routing

    def share(places: int) -> float:
        return expected_copies_per_token(moe.num_experts, moe.top_k, places) / moe.top_k

    return {level.name: share(expert_parallel if level in inside else reachable) for level in platform.levels}
