"""Forked processes on this machine under one watching parent: they all finish, or all stop and one line says why.

The parent blames the rank that failed by itself. Ranks that failed because another one vanished (a closed connection, a
timeout in a collective) are only witnesses: their parent waits a moment for the culprit to show.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipermoe.processes.blame import Failure, culprit, failure_of, named, not_waiting
from pipermoe.processes.progress import show_cursor
from pipermoe.processes.world import World

GRACE_SECONDS = 2.0  # how long witnesses wait for the culprit
LOOK_SECONDS = 0.2  # how often the parent looks after what it does meanwhile


@dataclass(frozen=True, slots=True)
class Family:
    """The processes of one call, and how they are spoken of. `doing` tells what one was doing last, "" if unknown."""

    noun: str
    processes: list[BaseProcess]
    readers: list[Connection]
    doing: Callable[[int], str]

    def name(self, rank: int) -> str:
        return named(self.noun, rank, self.doing(rank))


def run_local_ranks(
    world_size: int,
    target: Callable[[World], object],
    output: Path,
    timeout_seconds: float = 180.0,
    *,
    noun: str = "rank",
    doing: Callable[[int], str] = lambda rank: "",
    meanwhile: Callable[[], object] | None = None,
) -> None:
    """Run `target` in `world_size` forked processes until all have returned; call `meanwhile` now and then.

    Raises `UserError` if a rank did, else `MachineError` with the culprit and its error in one line; the traceback of
    an unexpected one goes into the folder `output`. On any exception, KeyboardInterrupt included, every process is
    killed before it propagates; when the parent itself is killed, they notice and end.
    """
    context = multiprocessing.get_context("fork")
    alive_end, parent_end = os.pipe()  # its other end closes when this process ends, however it ends
    family = Family(noun, [], [], doing)
    with tempfile.TemporaryDirectory(prefix="pipermoe-") as folder:
        try:
            with _interrupts_held_back():
                for rank in range(world_size):
                    world = World("pipermoe", rank, world_size, rank, f"file://{folder}/store")
                    reader, writer = context.Pipe(duplex=False)
                    arguments = (target, world, noun, output, writer, alive_end, parent_end)
                    process = context.Process(target=_child, args=arguments, name=f"{noun} {rank}")
                    process.start()
                    writer.close()
                    family.processes.append(process)
                    family.readers.append(reader)
            _watch(family, timeout_seconds, meanwhile)
        finally:
            for process in family.processes:
                if process.is_alive():
                    process.kill()
            for process in family.processes:
                process.join()
            show_cursor()
            for reader in family.readers:
                reader.close()
            os.close(alive_end)
            os.close(parent_end)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C comes after the block: in it a process may have been started that nobody knows of yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(target, world: World, noun: str, output: Path, writer: Connection, alive_end: int, parent_end: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops everyone at once
    os.close(parent_end)
    threading.Thread(target=_end_with_parent, args=(alive_end,), daemon=True).start()
    if loopback := _loopback():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    code = 0
    try:
        target(world)
    except BaseException as error:
        failure = failure_of(world.rank, noun, error, output)
        writer.send_bytes(json.dumps({"kind": failure.kind, "message": failure.message}).encode())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no atexit handlers of the parent, no waiting for the communication threads of a broken world


def _end_with_parent(alive_end: int) -> None:
    os.read(alive_end, 1)
    os._exit(1)


def _loopback() -> str | None:
    """The loopback interface: local ranks need no resolvable host name, which laptops and containers often lack."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _watch(family: Family, timeout_seconds: float, meanwhile: Callable[[], object] | None) -> None:
    """Return when every rank has ended well; raise for the culprit as soon as it is known."""
    running = set(range(len(family.processes)))
    failures: dict[int, Failure] = {}
    deadline: float | None = None
    while running:
        patience = None if meanwhile is None else LOOK_SECONDS
        if deadline is not None:
            patience = max(0.0, deadline - time.monotonic())
        wait([family.processes[rank].sentinel for rank in running], patience)
        if meanwhile is not None:
            meanwhile()
        for rank in sorted(running):
            if family.processes[rank].exitcode is not None:
                running.remove(rank)
                if family.processes[rank].exitcode != 0:
                    failures[rank] = _last_words(family, rank)
        if failures:
            now = time.monotonic()
            deadline = deadline or now + GRACE_SECONDS
            if any(failure.kind != "witness" for failure in failures.values()) or now >= deadline or not running:
                raise culprit(failures, _silent(family, sorted(running)), timeout_seconds).error


def _last_words(family: Family, rank: int) -> Failure:
    """What a rank reported before it ended, or how it died."""
    try:
        if family.readers[rank].poll():
            words = json.loads(family.readers[rank].recv_bytes())
            return Failure(rank, words["kind"], words["message"])
    except EOFError:
        pass
    code = family.processes[rank].exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
    return Failure(rank, "own", f"{family.name(rank)} {how} without a word{hint}")


def _silent(family: Family, running: list[int]) -> list[str]:
    """Who has not answered: the ranks that the system has stopped, if there are such, else who did not only wait."""
    stopped = [rank for rank in running if _is_stopped(family.processes[rank].pid)]
    return [family.name(rank) for rank in stopped or not_waiting({rank: family.doing(rank) for rank in running})]


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False
