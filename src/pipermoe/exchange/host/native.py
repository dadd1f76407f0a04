"""Runs a program in C (`native.c`), compiled with the system's C compiler when it is first used.

For small messages Python's time per message is what an exchange takes: on 16 ranks that share 2 cores the C loop halves
it or better (docs/exchange.md). Without a compiler everything works, by `loop.py`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pipermoe.exchange.host.loop import stuck
from pipermoe.exchange.host.program import Program, Transfer, Way
from pipermoe.exchange.host.shared_memory import SharedNode
from pipermoe.exchange.host.sockets import Sockets
from pipermoe.exchange.plan import Ints
from pipermoe.specs.errors import MachineError

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O2", "-shared", "-fPIC")
SLICE_MILLISECONDS = 200  # after which Python looks for signals and the timeout
_DONE, _MOVED, _IDLE = 0, 1, 2


def library_path() -> Path:
    """Where the compiled loop is kept: in the user's cache, under a name that its source and machine determine."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(SOURCE.read_bytes() + platform.machine().encode()).hexdigest()[:16]
    return cache_home / "pipermoe" / f"exchange-{digest}.so"


def build() -> bool:
    """Compiles the loop unless it is there; whether it is there then. Several processes may do so at once."""
    if sys.platform != "linux":
        return False
    path, compiler = library_path(), shutil.which(os.environ.get("CC", "cc"))
    if path.exists():
        return True
    if compiler is None:
        return False
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            target = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, "-o", target, SOURCE], check=True, capture_output=True)
            target.replace(path)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


class _Program(ctypes.Structure):
    _fields_ = [
        ("sends", ctypes.c_int64),
        ("receives", ctypes.c_int64),
        ("send", ctypes.c_void_p),
        ("receive", ctypes.c_void_p),
        ("range", ctypes.c_void_p),
        ("first_follower", ctypes.c_void_p),
        ("follower", ctypes.c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.exchange_open.restype, library.exchange_open.argtypes = pointer, [number, number, number, pointer, pointer]
    library.exchange_connect.argtypes = [pointer, number, number]
    library.exchange_run.argtypes = [*[pointer] * 6, number, number]
    library.exchange_pending.restype, library.exchange_pending.argtypes = ctypes.c_int64, [pointer]
    library.exchange_progress.argtypes = [pointer, number]
    library.exchange_failed_peer.argtypes = [pointer, pointer]
    library.exchange_close.argtypes = [pointer]
    return library


@dataclass(frozen=True, slots=True)
class NativeProgram:
    """A program as the arrays that `native.c` reads."""

    program: Program
    structure: _Program
    address: int  # of the structure
    arrays: tuple[Ints, ...]  # which it points into


def encode(program: Program, local_index: dict[int, int]) -> NativeProgram:
    """`local_index` numbers the ranks of the node, as shared memory does."""
    ranges: list[tuple[int, int, int]] = []

    def span(places) -> tuple[int, int]:
        ranges.extend(places)
        return len(ranges) - len(places), len(ranges)

    def peer(transfer: Transfer) -> int:
        return local_index[transfer.peer] if transfer.way == Way.MEMORY else transfer.peer

    receives = [(r.way, peer(r), *span(r.ranges), r.slot) for r in program.receives]
    sends = [(s.way, peer(s), *span(s.ranges), *span(s.copied_to), s.slot, len(s.waits)) for s in program.sends]
    number = {t.message: n for n, t in enumerate((*program.receives, *program.sends))}
    followers: list[list[int]] = [[] for _ in number]
    for index, send in enumerate(program.sends):
        for message in send.waits:
            followers[number[message]].append(index)
    first = np.cumsum([0, *map(len, followers)])
    columns = (sends, receives, ranges, first, [index for row in followers for index in row])
    arrays = tuple(np.ascontiguousarray(column, dtype=np.int64) for column in columns)
    structure = _Program(len(sends), len(receives), *(array.ctypes.data for array in arrays))
    return NativeProgram(program, structure, ctypes.addressof(structure), arrays)


class NativeLoop:
    """The connections of one rank, and the programs that run over them one after the other."""

    def __init__(self, ranks: int, node: SharedNode | None, sockets: Sockets):
        self.node, self.sockets = node, sockets
        self._connected: set[int] = set()
        self._library = _library()
        self._run = self._library.exchange_run
        words, bells, index, size = None, None, 0, 0
        if node is not None:
            words = ctypes.addressof(ctypes.c_uint32.from_buffer(node.control))
            bells, index, size = (ctypes.c_int * node.size)(*node.bells), node.index, node.size
        self._links = self._library.exchange_open(ranks, index, size, words, bells)

    def complete(self, native: NativeProgram, input: int, output: int, staging: int) -> None:
        """Until all has arrived and left, given the buffers' addresses. MachineError if nothing at all moves for the
        sockets' timeout.
        """
        if len(self._connected) < len(self.sockets.connections):
            self._adopt_connections()
        regions, turn = None, 0
        if self.node is not None:
            self.node.begin(native.program.written_bytes)
            regions, turn = self.node.regions_address, self.node.turn
        status = self._run(self._links, native.address, input, output, staging, regions, turn, SLICE_MILLISECONDS)
        if status != _DONE:
            self._go_on(native.program, status)

    def _go_on(self, program: Program, status: int) -> None:
        last = 0.0
        while status != _DONE:
            if status < 0:
                self._fail(program.rank, -status)
            now = time.monotonic()
            last = now if status == _MOVED else last or now - SLICE_MILLISECONDS / 1e3
            if now > last + self.sockets.timeout:
                pending = self._library.exchange_pending(self._links)
                peer = program.receives[pending].peer if pending >= 0 else None
                raise MachineError(f"rank {program.rank}: {stuck(peer, self.sockets.timeout)}")
            status = self._library.exchange_progress(self._links, SLICE_MILLISECONDS)

    def _adopt_connections(self) -> None:
        for peer in self.sockets.connections.keys() - self._connected:
            self._library.exchange_connect(self._links, peer, self.sockets.connections[peer].fileno())
            self._connected.add(peer)

    def _fail(self, rank: int, code: int) -> None:
        sending = ctypes.c_int()
        peer = self._library.exchange_failed_peer(self._links, ctypes.byref(sending))
        verb = "sending to" if sending.value else "receiving from"
        reason = "the connection was closed" if code == errno.ECONNRESET else os.strerror(code)
        raise MachineError(f"rank {rank}: {verb} rank {peer} failed: {reason}")

    def __del__(self) -> None:
        self._library.exchange_close(self._links)
