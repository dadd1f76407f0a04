"""Measure this machine: let ranks time what training does, make a Platform of it."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipermoe.measure.machine import host_memory_bytes, usable_cores
from pipermoe.processes.world import World, existing_world
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.units import format_bytes

if TYPE_CHECKING:
    from pipermoe.measure.program import Job

RANKS_PER_CORE = 16  # more than this share a core so thinly that nothing measured would mean anything
SMALLEST_MEMORY = 2**20
LOCAL_RANKS = 4
LIMIT_SECONDS = 120.0
GPU_MODEL = "qwen3-30b-a3b"  # whose widths a GPU is measured at unless another model is named


def measure_platform(
    *,
    nproc: int | None = None,
    model: ModelSpec | None = None,
    memory_bytes: int | None = None,
    quick: bool = False,
    record: Path | None = None,
) -> Platform | None:
    """Measure this machine with `nproc` ranks (4): GPUs if it has any, else processes of one thread.

    Where torchrun or srun have started the ranks, measures with those, on as many hosts as they are; then ranks but 0
    return None. `model` gives the widths to measure at, `memory_bytes` the memory budget of one rank (default: this
    machine's memory over its ranks). What has been measured is kept in the file `record` section by section; if it is
    there already, the measurement continues it. Takes about 45 seconds, `quick` about 12. Tells its progress on stderr.
    Raises `UserError` for arguments that cannot be, `MachineError` when a rank fails.
    """
    world = existing_world(os.environ)
    if memory_bytes is not None and memory_bytes < SMALLEST_MEMORY:
        rule = f"must be at least {format_bytes(SMALLEST_MEMORY)} for one rank"
        raise UserError(describe_value("measure", "memory", memory_bytes, rule))
    if world is not None and nproc is not None:
        raise UserError(f"--nproc = {nproc}: {world.starter} has started the ranks already; leave it out")
    nproc = LOCAL_RANKS if nproc is None else nproc
    if world is None:
        _check_ranks(nproc)
    gpus = _import_torch().cuda.device_count()
    if world is None and 0 < gpus < nproc:
        raise UserError(describe_value("measure", "nproc", nproc, f"must be at most {gpus}, one rank for each GPU"))
    with tempfile.TemporaryDirectory(prefix="pipermoe-measure-") as folder:
        job = _job(gpus, model, quick, record or Path(folder) / "record.json")
        if world is None:
            _measure_here(nproc, job)
        else:
            _measure_there(world, job)
            if world.rank:
                return None
        return _platform(job, memory_bytes)


def _check_ranks(nproc: int) -> None:
    cores = usable_cores()
    if not 1 <= nproc <= RANKS_PER_CORE * cores:
        rule = f"must be from 1 to {RANKS_PER_CORE * cores} ranks ({RANKS_PER_CORE} for each of {cores} cores)"
        raise UserError(describe_value("measure", "nproc", nproc, rule))


def _job(gpus: int, model: ModelSpec | None, quick: bool, record: Path) -> Job:
    from pipermoe.measure import sizes
    from pipermoe.measure.program import Job
    from pipermoe.specs.catalogue import load_model

    if gpus and model is None:
        model = load_model(GPU_MODEL)
    effort = sizes.QUICK if quick else sizes.FULL
    return Job(
        use_gpu=gpus > 0,
        cores=gpus or usable_cores(),
        precision="bf16" if gpus else "fp32",
        widths=sizes.Widths.of(model) if model else sizes.Widths(),
        effort=sizes.on_gpu(effort) if gpus else effort,
        record=record,
    )


def _measure_here(nproc: int, job: Job) -> None:
    """Fork the ranks; each section that rank 0 begins is shown."""
    from pipermoe.measure.program import measure_rank, section_names
    from pipermoe.measure.progress import progress
    from pipermoe.processes.local_ranks import run_local_ranks
    from pipermoe.processes.status_board import StatusBoard

    board = StatusBoard(nproc)
    with progress(len(section_names(nproc, nproc))) as show:
        run_local_ranks(
            nproc,
            lambda world: measure_rank(world, job, board.writer(world.rank)),
            job.record.parent,
            LIMIT_SECONDS,
            doing=board.read,
            meanwhile=_on_change(lambda: board.read(0), show),
        )


def _on_change(read: Callable[[], str], show: Callable[[str], None]) -> Callable[[], None]:
    last = ""

    def look() -> None:
        nonlocal last
        if (now := read()) != last:
            last = now
            show(now)

    return look


def _measure_there(world: World, job: Job) -> None:
    """Measure as a rank that others have started; they end it as well."""
    from pipermoe.measure.program import measure_rank, section_names
    from pipermoe.measure.progress import progress
    from pipermoe.processes.interrupt import end_on_signals

    end_on_signals(say=world.rank == 0)
    if world.rank:
        measure_rank(world, job, lambda section: None)
        return
    with progress(len(section_names(world.size, world.size))) as show:
        measure_rank(world, job, show)


def _platform(job: Job, memory_bytes: int | None) -> Platform:
    from pipermoe.measure.assemble import Assembly
    from pipermoe.measure.record import Record
    from pipermoe.specs.documents import load

    record = load(job.record, Record)
    memory, source, reserved = _memory(memory_bytes, record.settings)
    return Assembly(record, memory, source, reserved, datetime.date.today().isoformat()).platform()


def _memory(asked: int | None, settings: Any) -> tuple[int, str, int]:
    """Bytes of one rank, where the number comes from, and the bytes that the framework keeps for itself."""
    if asked is not None:
        return asked, "the budget that was given", 0
    if settings.device_bytes:
        return settings.device_bytes, "the memory of the GPU", settings.reserved_bytes
    ranks = settings.ranks_per_host
    return host_memory_bytes() // ranks, f"this machine's memory over {ranks} ranks", 0


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError("measure: PyTorch is not installed; install it with: pip install 'pipermoe[train]'") from None
    return torch
