"""Forked ranks that report to their parent: they end together, whatever ends first.

Messages are JSON through pipes. A rank that dies is named; Ctrl-C ends all ranks at once; a rank whose parent is gone
ends too.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from pipermoe.specs.errors import MachineError

Report = Callable[[str], None]
Program = Callable[[int, Report], Any]
PR_SET_PDEATHSIG = 1  # Linux: the signal a process receives when its parent ends
SECONDS_TO_NAME_THE_FIRST = 0.5  # a dying rank breaks its peers' connections: wait for the cause to show


def run_ranks(program: Program, ranks: int, on_step: Report, limit_seconds: float) -> list[Any]:
    """Run `program(rank, report)` in `ranks` forked processes; the JSON-able results in rank order.

    `on_step` receives what rank 0 reports. Raises `MachineError` when a rank fails, dies or `limit_seconds` pass.
    """
    context = multiprocessing.get_context("fork")
    parent = os.getpid()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_rank_main, args=(program, rank, pipes, parent), daemon=True) for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        return _collect([reader for reader, _ in pipes], processes, on_step, time.monotonic() + limit_seconds)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for reader, _ in pipes:
            reader.close()


def _rank_main(program: Program, rank: int, pipes: list[tuple[Connection, Connection]], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends every rank
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    pipe = pipes[rank][1]
    for reader, writer in pipes:  # inherited ends would keep a dead rank's pipe open
        reader.close()
        if writer is not pipe:
            writer.close()

    def send(kind: str, value: Any) -> None:
        pipe.send_bytes(json.dumps([kind, value]).encode())

    try:
        send("result", program(rank, lambda step: send("step", step)))
        os._exit(0)  # skips destructors of communication threads, which may wait for ranks that are gone
    except BaseException as error:
        send("failure", f"{type(error).__name__}: {error}".splitlines()[0][:300])
        os._exit(1)


def _collect(readers: list[Connection], processes: list[Any], on_step: Report, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    steps = ["starting"] * len(readers)
    waiting = dict(enumerate(readers))
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise MachineError(f"measuring did not end in time; rank 0 was measuring {steps[0]}")
        for rank in [rank for rank, reader in waiting.items() if reader in ready]:
            try:
                kind, value = json.loads(waiting[rank].recv_bytes())
            except EOFError:
                raise MachineError(_cause(processes, rank, "it ended without a word", steps[rank])) from None
            if kind == "failure":
                raise MachineError(_cause(processes, rank, value, steps[rank]))
            if kind == "result":
                results[rank] = value
                del waiting[rank]
            else:
                steps[rank] = value
                if rank == 0:
                    on_step(value)
    return [results[rank] for rank in range(len(readers))]


def _cause(processes: list[Any], rank: int, reason: str, step: str) -> str:
    """Name the rank that a signal ended, if there is one; else the rank that failed first."""
    deadline = time.monotonic() + SECONDS_TO_NAME_THE_FIRST
    wait([process.sentinel for process in processes], timeout=SECONDS_TO_NAME_THE_FIRST)
    while time.monotonic() < deadline:
        for killed, process in enumerate(processes):
            if process.exitcode is not None and process.exitcode < 0:
                name = signal.Signals(-process.exitcode).name
                return f"rank {killed} died ({name}) while measuring {step}; is there enough memory for every rank?"
        time.sleep(0.02)
    return f"rank {rank} failed while measuring {step}: {reason}"
