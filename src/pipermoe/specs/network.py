"""The network of a machine, level by level: measured costs of collectives, or the links that carry them."""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipermoe.specs.base import Frozen
from pipermoe.specs.device import RateCurve
from pipermoe.specs.units import BytesPerSecond, Seconds

Collective = Literal["send", "all_to_all", "all_reduce", "all_gather", "reduce_scatter"]
COLLECTIVES: tuple[Collective, ...] = ("send", "all_to_all", "all_reduce", "all_gather", "reduce_scatter")

# Inside a node traffic to other nodes takes another way; the ports of a network carry all that leaves a node.
Topology = Literal["fully_connected", "direct_links", "rail_optimized", "fat_tree", "dragonfly"]
INSIDE_A_NODE: tuple[Topology, ...] = ("fully_connected", "direct_links")


class LinkCost(Frozen):
    """Seconds of one call = `latency_seconds` + bytes / `bandwidth_bytes_per_s`.

    Bytes are what `specs.report.Traffic` counts for one rank: send and all-to-all the bytes that leave the rank (in an
    uneven all-to-all those of the busiest rank, sent or received), all-reduce the tensor, reduce-scatter the input,
    all-gather the output.
    """

    latency_seconds: Seconds = Field(ge=0)
    bandwidth_bytes_per_s: BytesPerSecond = Field(gt=0)


class CollectiveRate(RateCurve):
    """What a library makes of a link: `rate` is the share of the link's bandwidth that it reaches.

    `size` counts the bytes that one rank sends over the link in the call, as a ring or a direct exchange would; where
    the switch reduces or multicasts, the share can exceed 1. A call among n ranks starts up in `latency_seconds` +
    (n - 1) x `latency_per_rank_seconds`, which `rate` does not contain.
    """

    latency_seconds: Seconds = Field(ge=0)
    latency_per_rank_seconds: Seconds = Field(default=0.0, ge=0)


class Link(Frozen):
    """What joins the blocks of the level below, or on the innermost level its ranks.

    - `bandwidth_bytes_per_s` of one port in one direction, `latency_seconds` of one message between two ports.
    - `shared_by`: so many consecutive ranks share one port (4 NICs for 8 ranks: 2).
    - `taper`: the share of all ports' bandwidth that the level carries when all ranks send at the same time (1: full
      bisection; a dragonfly's global links, a tapered tree's uplinks: less).
    - `links`: for "direct_links" the bundles [a, b, n]: n links of `bandwidth_bytes_per_s` between ranks a and b.
      Messages between ranks without one are passed on along shortest paths.
    - `library` and `collectives`: how well whose collectives use the link. What is not listed uses all of it.
    """

    topology: Topology
    bandwidth_bytes_per_s: BytesPerSecond = Field(gt=0)
    latency_seconds: Seconds = Field(ge=0)
    shared_by: PositiveInt = 1
    taper: PositiveFloat = Field(default=1.0, le=1)
    links: tuple[tuple[int, int, PositiveInt], ...] = ()
    library: str = ""
    collectives: dict[Collective, CollectiveRate] = {}

    @model_validator(mode="after")
    def _links_fit_the_topology(self) -> Link:
        if bool(self.links) != (self.topology == "direct_links"):
            raise ValueError("links are given for topology = 'direct_links' and for no other")
        return self


class Level(Frozen):
    """One level of the network: `ranks` consecutive ranks reach each other (innermost level first).

    Measured: `cost` holds for groups of all `ranks` of the level, "send" for any two of them. `group_cost[n]` holds for
    groups of n < `ranks` members anywhere inside the level, all such groups at work at once; a size that is not listed
    costs what the next larger listed one does. Not measured: `link` describes what carries the traffic, and costs
    follow from it (`resources.rates`).
    """

    name: str
    ranks: PositiveInt
    cost: dict[Collective, LinkCost] = {}
    group_cost: dict[PositiveInt, dict[Collective, LinkCost]] = {}
    link: Link | None = None

    @model_validator(mode="after")
    def _is_priced(self) -> Level:
        if self.link is not None and self.cost:
            raise ValueError("give either cost (measured) or link (described), not both")
        missing = [name for name in COLLECTIVES if name not in self.cost]
        if self.link is None and missing:
            raise ValueError(f"cost is missing for {', '.join(missing)}; or describe the level by a link")
        too_large = [size for size in self.group_cost if size >= self.ranks]
        if too_large:
            raise ValueError(f"group_cost sizes {too_large} must be below ranks = {self.ranks}")
        if self.link is not None and self.link.links:
            _require_connected(self.link.links, self.ranks)
        return self


Bundles = tuple[tuple[int, int, int], ...]


@lru_cache
def links_per_rank(links: Bundles, ranks: int, block: int = 1) -> float:
    """How many links' worth a rank sends when every rank sends equally to all others outside its own block.

    Every message is divided over its shortest paths, at each rank in proportion to the links that lead on; the busiest
    bundle limits all.
    """
    width = _both_ways(links)
    load = dict.fromkeys(width, Fraction(0))
    for destination in range(ranks):
        hops = _hops_to(destination, width, ranks)
        carried = {rank: Fraction(rank // block != destination // block) for rank in range(ranks)}
        for rank in sorted(range(ranks), key=hops.__getitem__, reverse=True):
            onward = [peer for peer in range(ranks) if (rank, peer) in width and hops[peer] < hops[rank]]
            total = sum(width[rank, peer] for peer in onward)
            for peer in onward:
                part = carried[rank] * width[rank, peer] / total
                load[rank, peer] += part
                carried[peer] += part
    return float((ranks - block) / max(load[bundle] / width[bundle] for bundle in width))


def _both_ways(links: Bundles) -> dict[tuple[int, int], int]:
    return {ends: n for a, b, n in links for ends in ((a, b), (b, a))}


def _hops_to(destination: int, width: dict[tuple[int, int], int], ranks: int) -> dict[int, int]:
    hops, queue = {destination: 0}, deque([destination])
    while queue:
        here = queue.popleft()
        for peer in range(ranks):
            if (peer, here) in width and peer not in hops:
                hops[peer] = hops[here] + 1
                queue.append(peer)
    return hops


def _require_connected(links: Bundles, ranks: int) -> None:
    outside = sorted({rank for a, b, _ in links for rank in (a, b) if not 0 <= rank < ranks})
    if outside:
        raise ValueError(f"link.links names ranks {outside}; the level has ranks 0 to {ranks - 1}")
    unreached = sorted(set(range(ranks)) - set(_hops_to(0, _both_ways(links), ranks)))
    if unreached:
        raise ValueError(f"link.links does not connect ranks {unreached} to rank 0; add a bundle [a, b, n] to each")
