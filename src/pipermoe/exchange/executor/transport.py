"""How the bytes of a process group's exchanges travel: found out once, together, the same on all ranks."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from pipermoe.exchange.executor.gather_json import all_gather_json
from pipermoe.exchange.executor.process_group import DeviceTransport, ProcessGroupTransport, as_bytes
from pipermoe.exchange.host import native, shared_memory, sockets
from pipermoe.exchange.host.loop import PythonLoop
from pipermoe.exchange.host.native import NativeLoop
from pipermoe.exchange.host.program import Way, lower
from pipermoe.exchange.host.shared_memory import SharedNode
from pipermoe.exchange.host.sockets import Sockets
from pipermoe.exchange.plan import ExchangePlan
from pipermoe.exchange.topology import Topology

Wanted = Literal["auto", "sockets", "python", "process_group"]


class Transport(Protocol):
    """Runs plans on contiguous tensors. What `prepare` makes of a plan is worth keeping."""

    name: str

    def prepare(self, plan: ExchangePlan) -> Any: ...

    def run(self, prepared: Any, buffers: Sequence[torch.Tensor]) -> None:
        """`buffers` are INPUT, OUTPUT and STAGING. Returns when this rank's part is complete, on a GPU when
        it is queued on the current stream."""
        ...

    def close(self) -> None: ...


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
        if self.native is not None:
            self.sockets.connect(prepared.program.socket_peers)
            self.native.complete(prepared, *(buffer.data_ptr() for buffer in buffers))
        else:
            self.sockets.connect(prepared.socket_peers)
            arrays = [as_bytes(buffer).numpy() for buffer in buffers]
            PythonLoop(prepared, arrays, self.node, self.local_index, self.sockets).complete()

    def close(self) -> None:
        self.native = None
        self.sockets.close()
        if self.node is not None:
            self.node.close()


def gather_places(group: dist.ProcessGroup) -> list[Any]:
    """Where every rank runs, [host name, boot]: host names alone may be equal on several machines. Collective."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return all_gather_json([socket.gethostname(), boot.read_text().strip() if boot.exists() else ""], group)


def open_transport(
    group: dist.ProcessGroup, places: list[Any], topology: Topology, wanted: Wanted, timeout: float
) -> Transport:
    """The best transport that all ranks can use; a collective call.

    "auto" is the compiled loop, without a compiler the one in Python, without sockets between all ranks the process
    group's own send and receive. "sockets" is the same without shared memory (which containers often have little of).
    On NCCL and RCCL it is always their grouped sends and receives.
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
    compiles = wanted != "python" and (not first_here or native.build())
    may_share = wanted != "sockets" and shared_memory.available()
    mine = [sockets.available(), may_share, compiles, secrets.token_hex(8), secrets.token_hex(16)]
    with_sockets, with_memory, compiled, names, keys = zip(*all_gather_json(mine, group), strict=True)
    if not all(with_sockets):
        return None
    one_machine = [len({tuple(places[r]) for r in ranks}) == 1 for ranks in topology.ranks_of_node]
    node = None
    if all(one_machine) and all(with_memory) and topology.num_nodes < size:
        node = _open_memory(group, topology, names)
    wires = Sockets(rank, bytes.fromhex(keys[0]), timeout)
    if (topology.num_nodes > 1 or node is None) and not _open_sockets(group, wires):
        return None
    return HostTransport(rank, topology, node, wires, all(compiled))


def _open_memory(group: dist.ProcessGroup, topology: Topology, names: Sequence[str]) -> SharedNode | None:
    """The shared memory of this rank's node, called after the node's first rank; None where any rank has none."""
    mates = topology.ranks_of_node[topology.node[group.rank()]]
    node = SharedNode(f"pipermoe-{names[mates[0]]}", mates.index(group.rank()), len(mates))
    for step in (node.create, node.attach, node.unlink):
        if not all(all_gather_json(_succeeds(step), group)):
            node.unlink()
            return None
    return node


def _open_sockets(group: dist.ProcessGroup, wires: Sockets) -> bool:
    """Whether all ranks listen, and each can reach the next."""
    addresses = all_gather_json(wires.address if _succeeds(wires.listen) else None, group)
    if not all(addresses):
        return False
    wires.addresses = [(host, port) for host, port in addresses]
    return all(all_gather_json(len(addresses) == 1 or wires.reaches((wires.rank + 1) % len(addresses)), group))


def _succeeds(act: Callable[[], Any]) -> bool:
    try:
        act()
    except OSError:
        return False
    return True
