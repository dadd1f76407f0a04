"""What every rank runs: the device first, as many ranks as have a core of their own; then all ranks; then the network.

After every section the ranks' points are gathered and rank 0 writes them down (`record`), so that a measurement that is
cut off goes on behind its last section.
"""

from __future__ import annotations

import platform as system
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Autograd and optimizers import these two at their first call: here once, before ranks are forked.
import torch._dynamo
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes

from pipermoe.exchange.executor.gather_json import all_gather_json
from pipermoe.exchange.executor.transport import gather_places
from pipermoe.measure import compute
from pipermoe.measure.clock import cpu_seconds, gpu_seconds, wall_seconds
from pipermoe.measure.collectives import Network, groupings
from pipermoe.measure.compute import Bench, Points
from pipermoe.measure.kernels import Kernels
from pipermoe.measure.machine import cpu_name
from pipermoe.measure.record import Record, Settings, keep_section, open_record, to_plain
from pipermoe.measure.samples import Point, summarize
from pipermoe.measure.sizes import Effort, Widths
from pipermoe.processes.world import World
from pipermoe.specs.errors import MachineError, UserError
from pipermoe.specs.precision import Precision

NOISE_SAMPLES = 8  # of the reference kernel between any two measurements
NETWORK_TIMEOUT = timedelta(seconds=120)
WARM_UP_CALLS = 10
PIECE_SECONDS = 5e-3  # of computing between two collectives: a layer of a small model
BURST = 10  # pieces; bursts with and without meetings in turn, so that what slows the machine for longer slows both
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure; `cores` ranks of a host have a core (or a GPU) of their own and measure the device."""

    use_gpu: bool
    cores: int
    precision: Precision
    widths: Widths
    effort: Effort
    record: Path


Section = Callable[[], Points]


def measure_rank(world: World, job: Job, tell: Callable[[str], None]) -> None:
    """Measure as one rank of `world`; rank 0 leaves the points of all ranks in `job.record`.

    `tell` hears the name of every section that begins. Raises `MachineError` naming rank and section.
    """
    doing = "meeting the other ranks"
    try:
        device = _join(world, job)
        group = dist.group.WORLD
        assert group is not None
        settings = _settings(job, device, gather_places(group))
        record = open_record(job.record, settings) if world.rank == 0 else Record(settings=settings)
        measured = all_gather_json(list(record.sections), group)[0]
        bed = _Bed(world, job, device, settings.ranks_per_host)
        for name, section in bed.sections():
            if name in measured:
                continue
            doing = name
            tell(name)
            points = section() | bed.noise()
            everyone = all_gather_json(to_plain(points), group)
            if world.rank == 0:
                record = keep_section(job.record, record, name, everyone)
        dist.barrier()
        dist.destroy_process_group()
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:300]
        raise MachineError(
            f"rank {world.rank} failed while measuring {doing}: {type(error).__name__}: {reason}"
        ) from error


def section_names(ranks: int, ranks_per_host: int) -> list[str]:
    """The sections of a measurement in their order."""
    collectives = [_collectives_of(grouping) for grouping in groupings(ranks, ranks_per_host)]
    return [*(name for name, _ in compute.SECTIONS), "all ranks at once", *collectives]


def _collectives_of(grouping: Any) -> str:
    apart = f", every {grouping.stride}th" if grouping.stride > 1 else ""
    return f"collectives of {grouping.size} ranks{apart}"


def _join(world: World, job: Job) -> torch.device:
    """Meet the other ranks; this rank's device."""
    torch.set_num_threads(1)
    torch.manual_seed(world.rank)
    device = torch.device("cuda", world.local_rank) if job.use_gpu else torch.device("cpu")
    if job.use_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if job.use_gpu else "gloo",
        init_method=world.init_method,
        rank=world.rank,
        world_size=world.size,
        timeout=NETWORK_TIMEOUT,
    )
    return device


def _settings(job: Job, device: torch.device, places: list[Any]) -> Settings:
    """What belongs to the points; `places` says on which host every rank is."""
    free_bytes, device_bytes = torch.cuda.mem_get_info() if job.use_gpu else (0, 0)
    per_host = places.count(places[0])
    if any(places[first : first + per_host] != [places[first]] * per_host for first in range(0, len(places), per_host)):
        hosts = sorted({place[0] for place in places})
        raise MachineError(f"hosts {', '.join(hosts)} hold different numbers of ranks; start as many on each, in order")
    return Settings(
        ranks=len(places),
        ranks_per_host=per_host,
        device=torch.cuda.get_device_name(device) if job.use_gpu else cpu_name(),
        device_bytes=device_bytes,
        reserved_bytes=device_bytes - free_bytes,
        precision=job.precision,
        widths=job.widths,
        effort=job.effort,
        software={
            "torch": torch.__version__,
            "python": system.python_version(),
            "system": f"{system.system()} {system.release()}",
            "cpu": cpu_name(),
            "network": "nccl" if job.use_gpu else "gloo",
        },
    )


class _Bed:
    """What one rank measures with: its device, its groups, and a yardstick."""

    def __init__(self, world: World, job: Job, device: torch.device, ranks_per_host: int) -> None:
        self.job, self.ranks = job, world.size
        self.ranks_per_host, self.alone = ranks_per_host, min(job.cores, ranks_per_host)
        self.quiet = world.local_rank < self.alone
        self.kernels = Kernels(device, DTYPES[job.precision])
        self.yardstick = self.kernels.reference(job.widths)
        self.clock = gpu_seconds if job.use_gpu else cpu_seconds
        self.network = Network(device, ranks_per_host, job.effort, gpu_seconds if job.use_gpu else wall_seconds)

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Every section with its name, as `section_names` lists them."""
        for name, section in compute.SECTIONS:
            yield name, partial(self._device, section)
        yield "all ranks at once", self._crowd
        for grouping in self.network.groupings:
            yield _collectives_of(grouping), partial(self.network.measure, grouping)

    def noise(self) -> Points:
        """A fixed kernel on the wall clock, on the ranks that have a core of their own: how steady the machine is."""
        dist.barrier()
        walls = []
        if self.quiet:
            wall_seconds(self.yardstick, WARM_UP_CALLS)
            walls = [Point(1, 1, wall_seconds(self.yardstick, 1)) for _ in range(NOISE_SAMPLES)]
        dist.barrier()
        return {"noise": walls}

    def _device(self, section: Callable[[Bench], None]) -> Points:
        bench = Bench(self.kernels, self.job.widths, self.job.effort, self.clock)
        if self.quiet:
            section(bench)
        return bench.points

    def _crowd(self) -> Points:
        """`alone`: seconds of the yardstick on a core of its own. `crowd`: the calls that one of all ranks makes.

        `alone` is computing time, so that load from outside shows in the crowd's rate and not in what it is compared
        with. Where ranks share cores `meeting.SIZE` is what a small all-to-all takes after every few milliseconds of
        computing, in groups of each size on a host: wall seconds beyond those of computing alone.
        """
        points: Points = {}
        calls_per_piece = torch.ones(1, dtype=torch.int64, device=self.kernels.device)
        if self.quiet:
            wall_seconds(self.yardstick, WARM_UP_CALLS)
            bench = Bench(self.kernels, self.job.widths, self.job.effort, self.clock)
            alone = bench.point("alone", self.alone, 1, [self.yardstick])
            points["alone"] = [alone]
            calls_per_piece.fill_(max(1, round(PIECE_SECONDS / alone.seconds)))
        dist.broadcast(calls_per_piece, 0)
        return points | self._bursts(int(calls_per_piece.item()))

    def _bursts(self, calls: int) -> Points:
        """All ranks compute pieces of so many calls: apart, and meeting after each in groups of every size."""
        meetings = self.network.on_host() if self.alone < self.ranks_per_host else []
        apart: list[float] = []
        beyond: dict[int, list[float]] = {grouping.size: [] for grouping in meetings}
        for _ in range(max(1, round(self.job.effort.crowd_seconds / PIECE_SECONDS / BURST))):
            apart.append(self._burst_seconds(calls, lambda: None))
            for grouping in meetings:
                together = self._burst_seconds(calls, partial(self.network.meet, grouping))
                beyond[grouping.size].append((together - apart[-1]) / BURST)
        dist.barrier()
        found = {f"meeting.{size}": [_typical(size, 1, seconds)] for size, seconds in beyond.items()}
        return found | {"crowd": [_typical(self.ranks, calls * BURST, apart)]}

    def _burst_seconds(self, calls: int, meet: Callable[[], None]) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(BURST):
            for _ in range(calls):
                self.yardstick()
            meet()
        if self.job.use_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _typical(size: float, work: float, timings: list[float]) -> Point:
    samples = summarize(timings)
    return Point(size, work, samples.seconds, round(samples.spread, 4), samples.kept, samples.dropped)
