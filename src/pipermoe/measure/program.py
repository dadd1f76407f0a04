"""What every rank runs: the device first, as many ranks as have a core of their own; then all ranks; then the network.

The result is JSON-able: points by the name of what was measured, merged over ranks by `measure.assemble`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipermoe.measure import compute
from pipermoe.measure.clock import Call, cpu_seconds, gpu_seconds, wall_seconds
from pipermoe.measure.collectives import Network, group_sizes
from pipermoe.measure.compute import Bench, Points
from pipermoe.measure.kernels import Kernels
from pipermoe.measure.samples import Point
from pipermoe.measure.sizes import Effort, Widths
from pipermoe.specs.network import COLLECTIVES

NOISE_SAMPLES = 8  # of the reference kernel between any two measurements
NETWORK_TIMEOUT = timedelta(seconds=120)
WARM_UP_CALLS = 10
PIECE_SECONDS = 5e-3  # of computing between two collectives: a layer of a small model


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure. `alone` ranks have a core (or a GPU) of their own and measure the device."""

    ranks: int
    alone: int
    use_gpu: bool
    store: str
    widths: Widths
    effort: Effort

    @property
    def steps(self) -> int:
        """How many steps a rank reports."""
        collectives = len(group_sizes(self.ranks)) if self.ranks > 1 else 0
        return len(compute.SECTIONS) + 1 + collectives


def measure_rank(rank: int, report: Callable[[str], None], job: Job) -> dict[str, Any]:
    """Measure as one of `job.ranks` ranks; the points of this rank as plain lists."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    device = torch.device("cuda", rank) if job.use_gpu else torch.device("cpu")
    if job.use_gpu:
        torch.cuda.set_device(device)
    _join(rank, job)
    free_bytes, device_bytes = torch.cuda.mem_get_info() if job.use_gpu else (0, 0)
    kernels = Kernels(device, torch.float32)
    bench = Bench(kernels, job.widths, job.effort, gpu_seconds if job.use_gpu else cpu_seconds)
    yardstick = Yardstick(kernels.reference(job.widths), quiet=rank < job.alone)
    for name, section in compute.SECTIONS:
        report(name)
        if rank < job.alone:
            section(bench)
        yardstick.sample()
    points = bench.points
    report("all ranks at once")
    network = Network(device, job.effort.message_seconds)
    points |= _crowd(bench, yardstick.call, job, network)
    points |= _network(network, report, job.effort, yardstick)
    if yardstick.walls:
        points["noise"] = [Point(1, 1, seconds) for seconds in yardstick.walls]
    dist.barrier()
    dist.destroy_process_group()
    plain = {key: [asdict(point) for point in measured] for key, measured in points.items()}
    return {
        "points": plain,
        "device": torch.cuda.get_device_name() if job.use_gpu else "",
        "device_bytes": device_bytes,
        "reserved_bytes": device_bytes - free_bytes,
    }


def _join(rank: int, job: Job) -> None:
    if sys.platform == "linux":  # every rank is on this host: no name look-up, no route that may be missing
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if job.use_gpu else "gloo",
        init_method=f"file://{job.store}",
        rank=rank,
        world_size=job.ranks,
        timeout=NETWORK_TIMEOUT,
    )


class Yardstick:
    """A fixed kernel, timed on the wall clock between any two measurements: how steady the machine is."""

    def __init__(self, call: Call, quiet: bool) -> None:
        self.call, self.quiet = call, quiet
        self.walls: list[float] = []

    def sample(self) -> None:
        """Time it on the ranks that have a core of their own, while the others wait."""
        dist.barrier()
        if self.quiet:
            wall_seconds(self.call, WARM_UP_CALLS)
            self.walls += [wall_seconds(self.call, 1) for _ in range(NOISE_SAMPLES)]
        dist.barrier()


def _crowd(bench: Bench, yardstick: Call, job: Job, network: Network) -> Points:
    """`alone`: seconds of the yardstick on a core of its own. `crowd`: the calls that one of all ranks made in seconds.

    Neighbours meet in a small all-to-all every few milliseconds, as in a training step: where ranks share cores, the
    wait for a neighbour whose turn has not come is part of the price. `alone` is computing time, so that load from
    outside shows in the crowd's rate and not in what it is compared with.
    """
    points: Points = {}
    calls_per_piece = torch.ones(1, dtype=torch.int64, device=bench.kernels.device)
    if dist.get_rank() < job.alone:
        wall_seconds(yardstick, WARM_UP_CALLS)
        bench.point("alone", job.alone, 1, [yardstick])
        points["alone"] = bench.points["alone"]
        calls_per_piece.fill_(max(1, round(PIECE_SECONDS / points["alone"][-1].seconds)))
    dist.broadcast(calls_per_piece, 0)
    calls, pieces = int(calls_per_piece.item()), max(1, round(job.effort.crowd_seconds / PIECE_SECONDS))
    dist.barrier()
    start = time.perf_counter()
    for _ in range(pieces):
        for _ in range(calls):
            yardstick()
        network.meet()
    if job.use_gpu:
        torch.cuda.synchronize()
    points["crowd"] = [Point(job.ranks, calls * pieces, time.perf_counter() - start)]
    dist.barrier()
    return points


def _network(network: Network, report: Callable[[str], None], effort: Effort, yardstick: Yardstick) -> Points:
    points: Points = {}
    if network.ranks == 1:
        return points

    def keep(key: str, point: Point | None) -> None:
        if point:
            points.setdefault(key, []).append(point)

    for size in network.groups:
        report(f"collectives of {size} ranks")
        for message_bytes in effort.message_bytes:
            for collective in COLLECTIVES:
                if collective != "send":
                    keep(f"{collective}.{size}", network.point(collective, size, message_bytes))
                elif size == network.ranks:
                    keep("send", network.point("send", size, message_bytes))
        yardstick.sample()
    keep("all_to_all_skew", network.skewed_all_to_all(effort.message_bytes[-2]))
    return points
