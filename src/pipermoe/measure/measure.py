"""Measure this machine: fork ranks, let them time what training does, make a Platform of it."""

from __future__ import annotations

import datetime
import os
import platform as system
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.units import format_bytes

RANKS_PER_CORE = 16  # more than this share a core so thinly that nothing measured would mean anything
SMALLEST_MEMORY = 2**20
LIMIT_SECONDS = 600.0


def measure_platform(
    *, nproc: int = 4, model: ModelSpec | None = None, memory_bytes: int | None = None, quick: bool = False
) -> Platform:
    """Measure this machine with `nproc` ranks: GPUs if it has any, else processes of one thread.

    `model` gives the widths to measure at, `memory_bytes` the memory budget of one rank (default: this machine's memory
    over the ranks). Takes about 45 seconds, `quick` about 12. Tells its progress on stderr.
    Raises `UserError` for arguments that cannot be, `MachineError` when a rank fails.
    """
    cores = _cores()
    if not 1 <= nproc <= RANKS_PER_CORE * cores:
        rule = f"must be from 1 to {RANKS_PER_CORE * cores} ranks ({RANKS_PER_CORE} for each of {cores} cores)"
        raise UserError(describe_value("measure", "nproc", nproc, rule))
    if memory_bytes is not None and memory_bytes < SMALLEST_MEMORY:
        rule = f"must be at least {format_bytes(SMALLEST_MEMORY)} for one rank"
        raise UserError(describe_value("measure", "memory", memory_bytes, rule))
    torch = _import_torch()
    gpus = torch.cuda.device_count()
    if 0 < gpus < nproc:
        raise UserError(describe_value("measure", "nproc", nproc, f"must be at most {gpus}, one rank for each GPU"))

    from pipermoe.measure.assemble import Assembly, Circumstances
    from pipermoe.measure.processes import run_ranks
    from pipermoe.measure.program import Job, measure_rank
    from pipermoe.measure.progress import progress
    from pipermoe.measure.samples import Point
    from pipermoe.measure.sizes import FULL, QUICK, Widths

    widths = Widths.of(model) if model else Widths()
    with tempfile.TemporaryDirectory(prefix="pipermoe-measure-") as folder:
        job = Job(
            ranks=nproc,
            alone=nproc if gpus else min(nproc, cores),
            use_gpu=gpus > 0,
            store=str(Path(folder) / "store"),
            widths=widths,
            effort=QUICK if quick else FULL,
        )
        with progress(job.steps) as on_step:
            answers = run_ranks(partial(measure_rank, job=job), nproc, on_step, LIMIT_SECONDS)
    per_rank = [
        {key: [Point(**point) for point in points] for key, points in answer["points"].items()} for answer in answers
    ]
    device = answers[0]["device"] or cpu_name()
    memory, source, reserved = _memory(memory_bytes, nproc, answers[0])
    facts = Circumstances(
        name=f"{device}, {nproc} ranks",
        device=device,
        memory_bytes=memory,
        memory_source=source,
        reserved_bytes=reserved,
        ranks=nproc,
        expert_width=widths.expert_width,
        date=datetime.date.today().isoformat(),
        software={
            "torch": torch.__version__,
            "python": system.python_version(),
            "system": f"{system.system()} {system.release()}",
            "cpu": cpu_name(),
            "network": "nccl" if gpus else "gloo",
        },
    )
    return Assembly(per_rank, facts).platform()


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return system.processor() or system.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, system.machine())


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory(asked: int | None, ranks: int, answer: dict[str, Any]) -> tuple[int, str, int]:
    """Bytes of one rank, where the number comes from, and the bytes that the framework keeps for itself."""
    if asked is not None:
        return asked, "the budget that was given", 0
    if answer["device_bytes"]:
        return answer["device_bytes"], "the memory of the GPU", answer["reserved_bytes"]
    return host_memory_bytes() // ranks, f"this machine's memory over {ranks} ranks", 0


def host_memory_bytes() -> int:
    """The memory that this machine's processes may use: physical, or less where a control group limits it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError("measure: PyTorch is not installed; install it with: pip install 'pipermoe[train]'") from None
    return torch
