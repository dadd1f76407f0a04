"""How the bytes of a process group's exchanges travel: found out once, together, the same on all ranks."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from pipermoe.exchange.executor.agreement import gather_values
from pipermoe.exchange.executor.process_group import DeviceTransport, ProcessGroupTransport
from pipermoe.exchange.host import native, shared_memory, sockets
from pipermoe.exchange.host.loop import PythonLoop
from pipermoe.exchange.host.native import NativeLoop
from pipermoe.exchange.host.program import Way, lower
from pipermoe.exchange.host.shared_memory import SharedNode
from pipermoe.exchange.host.sockets import Sockets
from pipermoe.exchange.plan import ExchangePlan
from pipermoe.exchange.topology import Topology
from pipermoe.specs.errors import MachineError

Wanted = Literal["auto", "python", "process_group"]


class Transport(Protocol):
    """Runs plans on tensors of bytes. What `prepare` makes of a plan is worth keeping."""

    name: str

    def prepare(self, plan: ExchangePlan) -> Any: ...

    def run(self, prepared: Any, buffers: Sequence[torch.Tensor]) -> None:
        """`buffers` are INPUT, OUTPUT and STAGING as bytes. Returns when this rank's part is complete, on a GPU when
        it is queued on the current stream."""
        ...


class HostTransport:
    """Shared memory inside nodes, sockets between them; the loop in C ("native") or in Python."""

    def __init__(self, rank: int, topology: Topology, node: SharedNode | None, wires: Sockets, compiled: bool):
        self.name = "native" if compiled else "python"
        self.rank, self.topology, self.node, self.sockets = rank, topology, node, wires
        self.local_index = {r: index for index, r in enumerate(topology.ranks_of_node[topology.node[rank]])}
        self.native = NativeLoop(topology.num_ranks, node, wires) if compiled else None
        if node is not None and not compiled:
            wires.listen_to(node.bells[node.index])

    def prepare(self, plan: ExchangePlan) -> Any:
        program = lower(plan, self.rank, self.topology, Way.MEMORY if self.node else Way.SOCKET, Way.SOCKET)
        return native.encode(program, self.local_index) if self.native else program

    def run(self, prepared: Any, buffers: Sequence[torch.Tensor]) -> None:
        arrays = [buffer.numpy() for buffer in buffers]
        if self.native is not None:
            self.sockets.connect(prepared.program.socket_peers)
            self.native.complete(prepared, arrays)
        else:
            self.sockets.connect(prepared.socket_peers)
            PythonLoop(prepared, arrays, self.node, self.local_index, self.sockets).complete()


def own_place() -> list[str]:
    """Two ranks with equal places share a machine: host names alone may be equal on several."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]


def open_transport(
    group: dist.ProcessGroup, places: list[Any], topology: Topology, wanted: Wanted, timeout: float
) -> Transport:
    """The best transport that all ranks can use; a collective call.

    "auto" is the compiled loop, without a compiler the one in Python, without shared memory or sockets between all
    ranks the process group's own send and receive. On NCCL and RCCL it is always their grouped sends and receives.
    """
    if dist.get_backend(group) == "nccl":
        return DeviceTransport(group)
    if wanted != "process_group" and (host := _open_host_transport(group, places, topology, wanted, timeout)):
        return host
    return ProcessGroupTransport(group, topology, timeout)


def _open_host_transport(
    group: dist.ProcessGroup, places: list[Any], topology: Topology, wanted: Wanted, timeout: float
) -> HostTransport | None:
    rank, size = group.rank(), group.size()
    first_here = places.index(places[rank]) == rank  # of this machine: it compiles
    compiles = wanted == "auto" and (not first_here or native.build())
    mine = [sockets.available(), shared_memory.available(), compiles, secrets.token_hex(16)]
    has_sockets, has_memory, compiled, tokens = zip(*gather_values(group, mine), strict=True)
    if not all(has_sockets):
        return None
    node = None
    true_nodes = all(len({tuple(places[r]) for r in ranks}) == 1 for ranks in topology.ranks_of_node)
    if true_nodes and all(has_memory) and topology.num_nodes < size:
        mates = topology.ranks_of_node[topology.node[rank]]
        node = SharedNode(f"pipermoe-{tokens[mates[0]]}", mates.index(rank), len(mates))
        for step in (node.create, node.attach, node.unlink):
            if not all(gather_values(group, _succeeds(step))):
                node.unlink()
                return None
    wires = Sockets(rank, bytes.fromhex(tokens[0]), timeout)
    if topology.num_nodes > 1 or node is None:
        listening = _succeeds(wires.listen)
        addresses = gather_values(group, wires.address if listening else None)
        if not all(addresses):
            return None
        wires.addresses = [(host, port) for host, port in addresses]
        if not all(gather_values(group, size == 1 or wires.reaches((rank + 1) % size))):
            return None
    return HostTransport(rank, topology, node, wires, all(compiled))


def _succeeds(act: Callable[[], Any]) -> bool:
    try:
        act()
    except (OSError, MachineError):
        return False
    return True


def gather_places(group: dist.ProcessGroup) -> list[Any]:
    """Where every rank runs, [host name, boot]; a collective call."""
    return gather_values(group, own_place())
