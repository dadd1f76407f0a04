"""The same machine but for one thing: what a question such as "a network twice as fast" means for a Platform."""

from __future__ import annotations

from pipermoe.specs.network import Collective, CollectiveRate, Level, LinkCost
from pipermoe.specs.platform import Platform


def with_network(platform: Platform, *, bandwidth: float = 1.0, latency: float = 1.0) -> Platform:
    """Every level's bandwidths and latencies times a factor, sends and collectives alike."""
    levels = tuple(_scaled(level, bandwidth, latency) for level in platform.levels)
    return platform.model_copy(update={"levels": levels})


def with_flat_network(platform: Platform) -> Platform:
    """Every rank as near as those on the innermost level: the machine of somebody who does not look."""
    return platform.model_copy(
        update={"levels": (platform.levels[0].model_copy(update={"ranks": platform.levels[-1].ranks}),)}
    )


def _scaled(level: Level, bandwidth: float, latency: float) -> Level:
    def costs(listed: dict[Collective, LinkCost]) -> dict[Collective, LinkCost]:
        return {
            name: LinkCost(
                latency_seconds=cost.latency_seconds * latency,
                bandwidth_bytes_per_s=cost.bandwidth_bytes_per_s * bandwidth,
            )
            for name, cost in listed.items()
        }

    if level.link is None:
        groups = {size: costs(listed) for size, listed in level.group_cost.items()}
        return level.model_copy(update={"cost": costs(level.cost), "group_cost": groups})
    link = level.link.model_copy(
        update={
            "bandwidth_bytes_per_s": level.link.bandwidth_bytes_per_s * bandwidth,
            "latency_seconds": level.link.latency_seconds * latency,
            "collectives": {name: _starting(rate, latency) for name, rate in level.link.collectives.items()},
        }
    )
    return level.model_copy(update={"link": link})


def _starting(rate: CollectiveRate, latency: float) -> CollectiveRate:
    return rate.model_copy(
        update={
            "latency_seconds": rate.latency_seconds * latency,
            "latency_per_rank_seconds": rate.latency_per_rank_seconds * latency,
        }
    )
