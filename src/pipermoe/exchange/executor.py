"""Runs exchange plans over torch.distributed point-to-point: the third reader of an ExchangePlan.

A send starts when the messages it depends on have completed; there are no barriers. On a gloo group, messages inside a
node pass through shared memory and messages between nodes over sockets of our own where all ranks can, else through the
process group, receives first. On NCCL and RCCL every level of dependencies is one group call. GPU tensors on a gloo
group pass through pinned host memory.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from pipermoe.exchange import shared, wire
from pipermoe.exchange.agreement import Request, agree
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.checker import check
from pipermoe.exchange.chooser import Chooser, candidates
from pipermoe.exchange.dispatch import DispatchPlan
from pipermoe.exchange.plan import INPUT, OUTPUT, STAGING, ExchangePlan, Ints, byte_matrix
from pipermoe.exchange.program import Program, Range, Transfer, lower
from pipermoe.exchange.topology import Topology
from pipermoe.exchange.wire import Arrival, Wire
from pipermoe.specs.errors import MachineError, UserError

AUTO = "auto"
TAG = 0x7A2A  # of all messages of exchanges, apart from those of the user
REMEMBERED_PLANS = 64
DEFAULT_TIMEOUT = 300.0


class Handle:
    """An exchange under way. `wait()` returns when the output is complete, and raises what went wrong."""

    def __init__(self, future: Future | None = None):
        self._future = future

    def wait(self, timeout: float | None = None) -> bool:
        if self._future is not None:
            self._future.result(timeout)
        return True

    def is_completed(self) -> bool:
        return self._future is None or self._future.done()


class Exchange:
    """The all-to-alls of one process group. All its ranks make the same calls in the same order.

    Without a topology it is found: ranks with one host name share a node. Making an Exchange is a collective call.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        topology: Topology | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        shared_memory: bool = True,
    ):
        self.group = group if group is not None else _default_group()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.timeout = timeout
        places = _all_gather_objects(
            self.group, (socket.gethostname(), _boot_id(), shared_memory and shared.available())
        )
        self.topology = topology or Topology.of_hosts([f"{host} {boot}" for host, boot, _ in places])
        if self.topology.num_ranks != self.size:
            raise UserError(f"the topology has {self.topology.num_ranks} ranks, the process group {self.size}")
        self.backend = dist.get_backend(self.group)
        self._shared = self._open_shared_memory(places)
        self._wire = self._open_wire() if shared_memory and self.backend == "gloo" else None
        self._plans: OrderedDict[tuple, ExchangePlan] = OrderedDict()
        self._programs: OrderedDict[int, tuple[ExchangePlan, Program]] = OrderedDict()
        self.chooser = Chooser(self.topology)
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._worker: ThreadPoolExecutor | None = None
        self._last: Future | None = None
        self._lock = threading.Lock()

    def plan(self, counts: ArrayLike, builder: str = AUTO, **parameters: Any) -> ExchangePlan:
        """The checked plan for a byte matrix, remembered: `counts` must be the same on all ranks.

        "auto" takes the builder that the chooser predicts to be fastest.
        """
        matrix = byte_matrix(counts)
        if builder == AUTO:
            choice = self.chooser.choose(matrix)
            builder, parameters = choice.builder, dict(choice.parameters)
        key = (builder, tuple(sorted(parameters.items())), matrix.tobytes())
        if key not in self._plans:
            plan = BUILDERS[builder](matrix, self.topology, **parameters)
            check(plan)
            self._remember(key, plan)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _remember(self, key: tuple, plan: ExchangePlan) -> None:
        self._plans[key] = plan
        if len(self._plans) > REMEMBERED_PLANS:
            self._plans.popitem(last=False)

    def run(self, plan: ExchangePlan, output: torch.Tensor, input: torch.Tensor) -> None:
        """Moves the bytes of `input` to `output`, both contiguous, sized as the plan's counts say."""
        self._check_sizes(plan, output, input)
        if self._last is not None and not self._last.done():
            self.start(plan, output, input).wait()
            return
        with self._lock:
            self._run(plan, output, input)

    def start(self, plan: ExchangePlan, output: torch.Tensor, input: torch.Tensor) -> Handle:
        """Like `run`, in the background; exchanges of one Exchange run in the order in which they were started."""
        self._check_sizes(plan, output, input)
        if self.backend == "nccl":  # asynchronous by itself: the work is queued on the stream
            self._run(plan, output, input)
            return Handle()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="exchange")
        ready = _record_event(input)

        def work() -> None:
            ready()
            with self._lock:
                self._run(plan, output, input)

        self._last = self._worker.submit(work)
        return Handle(self._last)

    def learn(self, counts: ArrayLike, repeats: int = 3) -> dict[str, float]:
        """Measures all candidates for a byte matrix and remembers: seconds of the slowest rank. A collective call."""
        matrix = byte_matrix(counts)
        sent = torch.zeros(int(matrix[self.rank].sum()), dtype=torch.uint8)
        received = torch.zeros(int(matrix[:, self.rank].sum()), dtype=torch.uint8)
        seconds = {}
        for choice in candidates(matrix, self.topology):
            plan = self.plan(matrix, choice.builder, **dict(choice.parameters))
            self.run(plan, received, sent)
            times = []
            for _ in range(repeats):
                self._gather_bytes(np.zeros(8, dtype=np.uint8))  # a common start
                begin = time.perf_counter()
                self.run(plan, received, sent)
                times.append(time.perf_counter() - begin)
            mine = np.array([np.median(times)])
            seconds[str(choice)] = float(self._gather_bytes(mine.view(np.uint8)).view(np.float64).max())
            self.chooser.record(choice, matrix, seconds[str(choice)])
        return seconds

    def reverse(self, plan: ExchangePlan) -> ExchangePlan:
        """The checked plan of the way back, remembered."""
        key = ("reverse", id(plan))
        if key not in self._plans:
            back = plan.reversed()
            check(back)
            self._remember(key, back)
            self._program(plan)  # which keeps the plan, so that its id stays its own
        return self._plans[key]

    def agree(self, request: Request) -> Ints:
        """What all ranks ask for, [P, P] rows from source to destination; the same UserError on all if they differ."""
        return agree(request, self._gather_bytes)

    def _gather_bytes(self, mine: np.ndarray) -> np.ndarray:
        """The bytes of every rank, [P, len(mine)]: an exchange of equal rows, so nothing needs to be agreed before."""
        counts = np.full((self.size, self.size), len(mine), dtype=np.int64)
        plan = self.plan(counts, "hierarchical" if self.topology.num_nodes < self.size else "direct")
        rows = torch.from_numpy(np.tile(mine, self.size))
        gathered = torch.empty_like(rows)
        if self.backend == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
            on_device = torch.empty_like(rows, device=device)
            self.run(plan, on_device, rows.to(device))
            gathered.copy_(on_device)
        else:
            self.run(plan, gathered, rows)
        return gathered.numpy().reshape(self.size, len(mine))

    def _check_sizes(self, plan: ExchangePlan, output: torch.Tensor, input: torch.Tensor) -> None:
        if plan.num_ranks != self.size:
            raise UserError(f"the plan is for {plan.num_ranks} ranks, the process group has {self.size}")
        program = self._program(plan)
        for name, tensor, expected in (
            ("input", input, program.input_bytes),
            ("output", output, program.output_bytes),
        ):
            if not tensor.is_contiguous():
                raise UserError(f"{name} must be contiguous; call .contiguous() first")
            if tensor.numel() * tensor.element_size() != expected:
                actual = tensor.numel() * tensor.element_size()
                raise UserError(f"{name} has {actual} bytes, the plan moves {expected} on rank {self.rank}")

    def _program(self, plan: ExchangePlan) -> Program:
        if (remembered := self._programs.get(id(plan))) is None:
            by_socket = wire.CAPACITY if self._wire else 0
            remembered = (plan, lower(plan, self.rank, self.topology if self._shared else None, by_socket))
            self._programs[id(plan)] = remembered
            if len(self._programs) > 2 * REMEMBERED_PLANS:
                self._programs.popitem(last=False)
        return remembered[1]

    def _run(self, plan: ExchangePlan, output: torch.Tensor, input: torch.Tensor) -> None:
        program = self._program(plan)
        if self.backend == "nccl":
            buffers = _bytes(input), _bytes(output), self._staging_like(input, program)
            run_levels(self.group, plan, program, buffers)
        elif input.is_cuda or output.is_cuda:
            sent = torch.empty(input.shape, dtype=input.dtype, pin_memory=True).copy_(input)
            received = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            self._run_on_host(program, received, sent)
            output.copy_(received)
        else:
            self._run_on_host(program, output, input)

    def _run_on_host(self, program: Program, output: torch.Tensor, input: torch.Tensor) -> None:
        buffers = _bytes(input), _bytes(output), self._staging_like(input, program)
        try:
            run = HostRun(self.group, program, buffers, self._shared, self._local_index, self._wire, self.timeout)
            run.complete()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise MachineError(f"rank {self.rank}: the exchange of {self.size} ranks failed: {reason}") from error

    def _staging_like(self, input: torch.Tensor, program: Program) -> torch.Tensor:
        """The staging buffer, reused from call to call."""
        device = input.device if self.backend == "nccl" else torch.device("cpu")
        if self._staging.numel() < program.staging_bytes or self._staging.device != device:
            self._staging = torch.empty(program.staging_bytes, dtype=torch.uint8, device=device)
        return self._staging

    def _open_shared_memory(self, places: list[tuple]) -> shared.SharedNode | None:
        """Memory shared by the ranks of this node; None on all ranks unless every node can."""
        ranks = self.topology.ranks_of_node[self.topology.node[self.rank]]
        self._local_index = {rank: index for index, rank in enumerate(ranks)}
        same_host = all(len({places[r][:2] for r in node_ranks}) == 1 for node_ranks in self.topology.ranks_of_node)
        if not same_host or not all(may for *_, may in places) or self.topology.num_nodes == self.size:
            return None
        names = _all_gather_objects(self.group, f"pipermoe-{os.getpid()}-{secrets.token_hex(6)}")
        node = shared.SharedNode(names[ranks[0]], self._local_index[self.rank], len(ranks), self.timeout)
        first = node.index == 0
        for act, mine in ((node.create_control, first), (node.attach_control, not first), (node.unlink_control, first)):
            if any(_all_gather_objects(self.group, mine and _fails(act))):
                return None
        return node

    def _open_wire(self) -> Wire | None:
        """Sockets between nodes; None on all ranks unless all can reach each other."""
        if self.size == 1 or (self.topology.num_nodes == 1 and self._shared):
            return None
        secret = _all_gather_objects(self.group, secrets.token_bytes(16))[0]
        try:
            mine = Wire(self.rank, secret, self.timeout) if wire.available() else None
        except OSError:
            mine = None
        addresses = _all_gather_objects(self.group, mine.address if mine else None)
        reached = mine is not None and None not in addresses and mine.reaches(addresses)
        return mine if all(_all_gather_objects(self.group, reached)) else None


class HostRun:
    """One execution of a program on CPU buffers."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        program: Program,
        buffers: Sequence[torch.Tensor],
        node: shared.SharedNode | None,
        local_index: dict[int, int],
        sockets: Wire | None,
        timeout: float,
    ):
        self.group, self.program, self.node, self.local_index, self.sockets = group, program, node, local_index, sockets
        self.tensors: dict[int, torch.Tensor] = dict(zip((INPUT, OUTPUT, STAGING), buffers, strict=True))
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self.limit = timedelta(seconds=timeout)
        self.arriving: dict[int, Any] = {}  # message -> how to complete it
        self.leaving: dict[int, Any] = {}
        self.inbox: dict[int, deque[Transfer]] = {}  # what peers send through shared memory, in order

    def complete(self) -> None:
        if self.node is not None:
            self.node.begin(self.program.shared_bytes)
        for receive in self.program.receives:  # first: a sender whose receiver is ready need not wait
            self._post(receive)
        for send in self.program.sends:
            for message in send.waits:
                self._finish(message)
            self._start(send)
        for message in list(self.arriving):
            self._finish(message)
        for message in list(self.leaving):
            self._finish(message)
        if self.sockets is not None:
            self.sockets.flush()
        if self.node is not None:
            self.node.end()

    def _post(self, receive: Transfer) -> None:
        if receive.slot >= 0:
            self.inbox.setdefault(receive.peer, deque()).append(receive)
            self.arriving[receive.message] = (receive, None, None)
            return
        if receive.by_socket:
            assert self.sockets is not None
            data = self._landing(receive)
            self.arriving[receive.message] = (receive, self.sockets.expect(receive.peer, data), data)
            return
        if len(receive.ranges) == 1:
            wire = self._slice(receive.ranges[0])
        else:
            wire = torch.empty(receive.length, dtype=torch.uint8)
        self.arriving[receive.message] = (receive, self.group.recv([wire], receive.peer, TAG), wire)

    def _start(self, send: Transfer) -> None:
        if send.copied_to:
            self._scatter(self._gather(send), send.copied_to)
        elif send.slot >= 0:
            assert self.node is not None
            self.node.wait_until_free()
            self._gather_into(self.node.slot(send.slot, send.length), send.ranges)
            self.node.send(self.local_index[send.peer])
        elif send.by_socket:
            assert self.sockets is not None
            self.sockets.send(send.peer, self._gathered(send))
        else:
            wire = self._slice(send.ranges[0]) if len(send.ranges) == 1 else torch.from_numpy(self._gather(send))
            self.leaving[send.message] = (self.group.send([wire], send.peer, TAG), wire)

    def _finish(self, message: int) -> None:
        """Completes a message of this rank, once."""
        if (arrival := self.arriving.get(message)) is not None:
            receive, work, wire = arrival
            if work is None:
                self._take_in_order(receive)
            elif isinstance(work, Arrival):
                assert self.sockets is not None
                del self.arriving[message]
                self.sockets.wait(work, receive.peer)
                if len(receive.ranges) > 1:
                    self._scatter(wire, receive.ranges)
            else:
                del self.arriving[message]
                work.wait(self.limit)
                if len(receive.ranges) > 1:
                    self._scatter(wire.numpy(), receive.ranges)
        elif (departure := self.leaving.pop(message, None)) is not None:
            departure[0].wait(self.limit)

    def _take_in_order(self, receive: Transfer) -> None:
        """Takes a message from its slot; a peer's messages come in order, so earlier ones are taken first."""
        inbox = self.inbox[receive.peer]
        while receive.message in self.arriving:
            next_one = inbox.popleft()
            self._take_from_slot(next_one)
            del self.arriving[next_one.message]

    def _take_from_slot(self, receive: Transfer) -> None:
        assert self.node is not None
        peer = self.local_index[receive.peer]
        self.node.receive(peer, self.sockets)
        self._scatter(self.node.slot(receive.slot, receive.length), receive.ranges)
        self.node.take(peer)

    def _landing(self, receive: Transfer) -> np.ndarray:
        """Where a message's bytes go: their place if it is one piece, else a buffer to scatter from."""
        (buffer, offset, length), *others = receive.ranges
        return np.empty(receive.length, dtype=np.uint8) if others else self.arrays[buffer][offset : offset + length]

    def _slice(self, place: Range) -> torch.Tensor:
        buffer, offset, length = place
        return self.tensors[buffer][offset : offset + length]

    def _gathered(self, send: Transfer) -> np.ndarray:
        """The bytes of a message, without a copy where they lie in one piece."""
        (buffer, offset, length), *others = send.ranges
        return self._gather(send) if others else self.arrays[buffer][offset : offset + length]

    def _gather(self, send: Transfer) -> np.ndarray:
        wire = np.empty(send.length, dtype=np.uint8)
        self._gather_into(wire, send.ranges)
        return wire

    def _gather_into(self, wire: np.ndarray, ranges: Sequence[Range]) -> None:
        at = 0
        for buffer, offset, length in ranges:
            wire[at : at + length] = self.arrays[buffer][offset : offset + length]
            at += length

    def _scatter(self, wire: np.ndarray, ranges: Sequence[Range]) -> None:
        at = 0
        for buffer, offset, length in ranges:
            self.arrays[buffer][offset : offset + length] = wire[at : at + length]
            at += length


def run_levels(group, plan: ExchangePlan, program: Program, buffers: Sequence[torch.Tensor]) -> None:
    """A program on buffers of one device, every level of dependencies in one group call: for NCCL and RCCL.

    All calls queue on the current stream, so a level starts on the device when its inputs are there.
    """
    tensors: dict[int, torch.Tensor] = dict(zip((INPUT, OUTPUT, STAGING), buffers, strict=True))
    level = plan.level
    transfers = sorted(
        [(int(level[t.message]), t.message, False, t) for t in program.receives]
        + [(int(level[t.message]), t.message, True, t) for t in program.sends]
    )
    for number in range(int(level.max(initial=-1)) + 1):
        operations, arrivals = [], []
        for _, _, sending, transfer in (entry for entry in transfers if entry[0] == number):
            pieces = [tensors[buffer][offset : offset + length] for buffer, offset, length in transfer.ranges]
            if transfer.copied_to:
                _split_into(torch.cat(pieces), [tensors[b][o : o + n] for b, o, n in transfer.copied_to])
            elif sending:
                wire = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                operations.append(dist.P2POp(dist.isend, wire, group=group, group_peer=transfer.peer, tag=TAG))
            else:
                wire = pieces[0] if len(pieces) == 1 else pieces[0].new_empty(transfer.length)
                operations.append(dist.P2POp(dist.irecv, wire, group=group, group_peer=transfer.peer, tag=TAG))
                arrivals.append((wire, pieces))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for wire, pieces in arrivals:
            if len(pieces) > 1:
                _split_into(wire, pieces)


def _split_into(wire: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    for part, piece in zip(wire.split([piece.numel() for piece in pieces]), pieces, strict=True):
        piece.copy_(part)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, exchange: Exchange, plan: ExchangePlan, rows: int):
        ctx.exchange, ctx.plan, ctx.rows = exchange, plan, x.shape[0]
        output = x.new_empty(rows, *x.shape[1:])
        exchange.run(plan, output, x.contiguous())
        return output

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        (gradient,) = gradients
        back = ctx.exchange.reverse(ctx.plan)
        result = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        ctx.exchange.run(back, result, gradient.contiguous())
        return result, None, None, None


def all_to_all(x: torch.Tensor, splits: ArrayLike, plan: ExchangePlan | str, exchange: Exchange) -> torch.Tensor:
    """Differentiable: rows of `x` ordered by destination to rows ordered by source; backward runs the reverse plan.

    `splits[s, d]` rows go from s to d, the same matrix on all ranks; `plan` is its plan in bytes or a builder's name.
    """
    splits = np.asarray(splits, dtype=np.int64)
    row_bytes = _row_bytes(x)
    if int(splits[exchange.rank].sum()) != x.shape[0]:
        raise UserError(
            f"splits[{exchange.rank}] sums to {splits[exchange.rank].sum()}, the input has {x.shape[0]} rows"
        )
    if isinstance(plan, str):
        plan = exchange.plan(splits * row_bytes, plan)
    if not np.array_equal(plan.counts, splits * row_bytes):
        raise UserError(f"the plan {plan.name!r} was built for other splits or rows of another size")
    output = _AllToAll.apply(x, exchange, plan, int(splits[:, exchange.rank].sum()))
    assert isinstance(output, torch.Tensor)
    return output


def dispatch(x: torch.Tensor, plan: DispatchPlan, exchange: Exchange, builder: str = "nic_balanced") -> torch.Tensor:
    """Rows of `x` [T, D] for the experts of every rank, [N, D]: one copy per token and node crosses. Differentiable.

    The backward pass sums gradients inside the node before they cross, as `combine` does.
    """
    carried = all_to_all(x[_index(plan.cross_index, x)], plan.cross_splits, builder, exchange)
    held = torch.cat([carried, x])
    fanned = all_to_all(held[_index(plan.fan_index, x)], plan.fan_splits, "direct", exchange)
    return fanned[_index(plan.expand_index, x)]


def combine(y: torch.Tensor, plan: DispatchPlan, exchange: Exchange, builder: str = "nic_balanced") -> torch.Tensor:
    """The transpose of `dispatch`: the sum per token, [T, D], of the (weighted) expert rows `y` [N, D]. Differentiable.

    Rows are summed per rank, then per node; one sum per token and node crosses.
    """
    gathered = y.new_zeros(int(plan.fan_splits[:, plan.rank].sum()), *y.shape[1:])
    gathered = gathered.index_add(0, _index(plan.expand_index, y), y)
    fanned = all_to_all(gathered, plan.fan_splits.T, "direct", exchange)
    held = y.new_zeros(plan.rows_held, *y.shape[1:]).index_add(0, _index(plan.fan_index, y), fanned)
    carried, own = held.split([plan.rows_held - plan.num_tokens, plan.num_tokens])
    crossed = all_to_all(carried, plan.cross_splits.T, builder, exchange)
    return own.index_add(0, _index(plan.cross_index, y), crossed)


def dispatch_weights(weights: torch.Tensor, plan: DispatchPlan, exchange: Exchange) -> torch.Tensor:
    """Gate weights [T, K] to the rows they belong to, [N]: what `combine` sums must be weighted before it crosses."""
    flat = weights.reshape(-1)[_index(plan.choice_index, weights)]
    return all_to_all(flat, plan.choice_splits, "direct", exchange)


def _index(index: Ints, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(like.device)


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    *,
    exchange: Exchange | None = None,
) -> Handle | None:
    """`torch.distributed.all_to_all_single` with its signature and semantics, by an exchange plan.

    All ranks first learn of all splits (one small exchange), so wrong arguments raise the same UserError on all of them
    before any data moves. Who knows the splits of all ranks calls `Exchange.run` with a plan and saves that.
    """
    exchange = exchange or exchange_of(group)
    rows = exchange.agree(_request(exchange.size, output, input, output_split_sizes, input_split_sizes))
    plan = exchange.plan(rows * _row_bytes(input))
    if async_op:
        return exchange.start(plan, output, input)
    exchange.run(plan, output, input)
    return None


_EXCHANGES: WeakKeyDictionary[dist.ProcessGroup, Exchange] = WeakKeyDictionary()


def exchange_of(group: dist.ProcessGroup | None = None) -> Exchange:
    """The Exchange of a process group, made at the first call, which is collective."""
    group = group if group is not None else _default_group()
    if group not in _EXCHANGES:
        _EXCHANGES[group] = Exchange(group)
    return _EXCHANGES[group]


def _request(size: int, output, input, output_split_sizes, input_split_sizes) -> Request:
    """This rank's arguments, or what is wrong with them."""
    problem = ""
    rows: list[tuple[int, ...]] = []
    for name, tensor, splits in (("output", output, output_split_sizes), ("input", input, input_split_sizes)):
        length = tensor.shape[0] if tensor.dim() else 0
        if not tensor.dim():
            problem = problem or f"{name} must have at least one dimension"
        elif not tensor.is_contiguous():
            problem = problem or f"{name} must be contiguous; call .contiguous() first"
        if splits is None:
            if length % size:
                problem = problem or f"{name} has {length} rows, which {size} ranks do not divide; give its split sizes"
            splits = [length // size] * size
        elif len(splits) != size:
            problem = problem or f"{name}_split_sizes has {len(splits)} entries for {size} ranks"
        elif any(split < 0 for split in splits):
            problem = problem or f"{name}_split_sizes = {list(splits)}: must be 0 or more"
        elif sum(splits) != length:
            problem = problem or f"{name}_split_sizes sums to {sum(splits)}, but {name} has {length} rows"
        rows.append(tuple(splits) if len(splits) == size else (0,) * size)
    if input.dtype != output.dtype:
        problem = problem or f"input is {input.dtype}, output is {output.dtype}: must be the same"
    return Request(rows[1], rows[0], _row_bytes(input), str(input.dtype), problem)


def _row_bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as bytes."""
    return tensor.detach().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def _record_event(tensor: torch.Tensor):
    """A call that waits until the work that makes `tensor` on its device is done."""
    if not tensor.is_cuda:
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _default_group() -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise UserError("an exchange needs torch.distributed; call init_process_group first")
    group = dist.group.WORLD
    assert group is not None
    return group


def _all_gather_objects(group: dist.ProcessGroup, mine: Any) -> list[Any]:
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    return gathered


def _boot_id() -> str:
    """Tells apart machines that bear the same host name."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _fails(act: Callable[[], None]) -> bool:
    try:
        act()
    except (OSError, MachineError):
        return True
    return False
