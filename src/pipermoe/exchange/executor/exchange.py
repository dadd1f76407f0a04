"""The all-to-alls of a process group: plans remembered, chosen, run, and run in the background."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from pipermoe.exchange.agreement import Request, agree
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.checker import check
from pipermoe.exchange.chooser import Chooser, candidates
from pipermoe.exchange.executor.remembered import Remembered
from pipermoe.exchange.executor.transport import Wanted, gather_places, open_transport
from pipermoe.exchange.plan import ExchangePlan, byte_matrix
from pipermoe.exchange.topology import Topology
from pipermoe.specs.errors import MachineError, UserError

AUTO = "auto"
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


@dataclass(frozen=True, slots=True)
class Ready:
    """A plan as its transport runs it, and the bytes of this rank's buffers."""

    plan: ExchangePlan
    prepared: Any
    input_bytes: int
    output_bytes: int
    staging_bytes: int


class Exchange:
    """The all-to-alls of one process group. All its ranks make the same calls in the same order.

    Without a topology it is found: ranks with one host name share a node. Making an Exchange is a collective call, and
    `transport` says how bytes travel (`open_transport`). A rank in which nothing moves for `timeout` seconds gives up.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        topology: Topology | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        transport: Wanted = "auto",
    ):
        self.group = group if group is not None else default_group()
        self.rank, self.size = self.group.rank(), self.group.size()
        places = gather_places(self.group)
        self.topology = topology or Topology.of_hosts([" ".join(place) for place in places])
        if self.topology.num_ranks != self.size:
            raise UserError(f"the topology has {self.topology.num_ranks} ranks, the process group {self.size}")
        self.transport = open_transport(self.group, places, self.topology, transport, timeout)
        self._plans = Remembered[ExchangePlan](REMEMBERED_PLANS)
        # By id of a plan, which is kept as well, so that its id stays its own.
        self._reversed = Remembered[tuple[ExchangePlan, ExchangePlan]](REMEMBERED_PLANS)
        self._ready = Remembered[Ready](2 * REMEMBERED_PLANS)
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
        return self._plans.get(key, lambda: _checked(BUILDERS[builder](matrix, self.topology, **parameters)))

    def run(self, plan: ExchangePlan, output: torch.Tensor, input: torch.Tensor) -> None:
        """Moves the bytes of `input` to `output`, both contiguous, sized as the plan's counts say."""
        ready = self._ready_for(plan, output, input)
        self.now(lambda: self._run(ready, output, input))

    def start(self, plan: ExchangePlan, output: torch.Tensor, input: torch.Tensor) -> Handle:
        """Like `run`, in the background; exchanges of one Exchange run in the order in which they were started."""
        ready = self._ready_for(plan, output, input)
        return self.later(input, lambda: self._run(ready, output, input))

    def run_agreed(self, request: Request, output: torch.Tensor, input: torch.Tensor) -> None:
        """What all ranks ask for, by the cheapest plan; the same UserError on all if they ask for different things.

        To be called by `now` or `later`: it is two exchanges, between which no other may come.
        """
        rows = agree(request, self._gather_bytes)
        self._run(self._made_ready(self.plan(rows * row_bytes(input))), output, input)

    def now(self, act: Callable[[], None]) -> None:
        """Exchanges on this thread, after those that were started before."""
        if self._last is not None and not self._last.done():
            self._in_background(act).result()
            return
        with self._lock:
            act()

    def later(self, input: torch.Tensor, act: Callable[[], None]) -> Handle:
        """Exchanges in the background, once the work that makes `input` on its device is done."""
        if self.transport.name == "device":  # asynchronous by itself: the work is queued on the stream
            act()
            return Handle()
        ready = _record_event(input)

        def work() -> None:
            ready()
            with self._lock:
                act()

        return Handle(self._in_background(work))

    def _in_background(self, act: Callable[[], None]) -> Future:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="exchange")
        self._last = self._worker.submit(act)
        return self._last

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
        return self._reversed.get(id(plan), lambda: (plan, _checked(plan.reversed())))[1]

    def _gather_bytes(self, mine: np.ndarray) -> np.ndarray:
        """The bytes of every rank, [P, len(mine)]: an exchange of equal rows, so nothing needs to be agreed before."""
        counts = np.full((self.size, self.size), len(mine), dtype=np.int64)
        plan = self.plan(counts, "hierarchical" if self.topology.num_nodes < self.size else "direct")
        ready = self._made_ready(plan)
        rows = torch.from_numpy(np.tile(mine, self.size))
        gathered = torch.empty_like(rows)
        if self.transport.name == "device":
            device = torch.device("cuda", torch.cuda.current_device())
            on_device = torch.empty_like(rows, device=device)
            self._run(ready, on_device, rows.to(device))
            gathered.copy_(on_device)
        else:
            self._run(ready, gathered, rows)
        return gathered.numpy().reshape(self.size, len(mine))

    def close(self) -> None:
        """Gives back connections and shared memory, once the exchanges that were started have ended."""
        if self._worker is not None:
            self._worker.shutdown()
        self.transport.close()

    def _ready_for(self, plan: ExchangePlan, output: torch.Tensor, input: torch.Tensor) -> Ready:
        """The plan made ready, for tensors that fit it; else UserError."""
        ready = self._made_ready(plan)
        for name, tensor, expected in (("input", input, ready.input_bytes), ("output", output, ready.output_bytes)):
            if not tensor.is_contiguous():
                raise UserError(f"{name} must be contiguous; call .contiguous() first")
            if tensor.nbytes != expected:
                raise UserError(f"{name} has {tensor.nbytes} bytes, the plan moves {expected} on rank {self.rank}")
        return ready

    def _made_ready(self, plan: ExchangePlan) -> Ready:
        return self._ready.get(id(plan), lambda: self._make_ready(plan))

    def _make_ready(self, plan: ExchangePlan) -> Ready:
        if plan.num_ranks != self.size:
            raise UserError(f"the plan is for {plan.num_ranks} ranks, the process group has {self.size}")
        sent, received = int(plan.counts[self.rank].sum()), int(plan.counts[:, self.rank].sum())
        return Ready(plan, self.transport.prepare(plan), sent, received, int(plan.staging_bytes[self.rank]))

    def _run(self, ready: Ready, output: torch.Tensor, input: torch.Tensor) -> None:
        """GPU tensors on a group of CPU processes pass through pinned host memory."""
        if not (input.is_cuda or output.is_cuda) or self.transport.name == "device":
            self._move(ready, output, input)
            return
        sent = torch.empty(input.shape, dtype=input.dtype, pin_memory=True).copy_(input)
        received = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        self._move(ready, received, sent)
        output.copy_(received)

    def _move(self, ready: Ready, output: torch.Tensor, input: torch.Tensor) -> None:
        try:
            self.transport.run(ready.prepared, (input, output, self._staging_on(input.device, ready.staging_bytes)))
        except MachineError as error:
            raise MachineError(f"the exchange of {self.size} ranks: {error}") from error

    def _staging_on(self, device: torch.device, size: int) -> torch.Tensor:
        """The staging buffer, reused from call to call."""
        if self._staging.numel() < size or self._staging.device != device:
            self._staging = torch.empty(size, dtype=torch.uint8, device=device)
        return self._staging


def _checked(plan: ExchangePlan) -> ExchangePlan:
    check(plan)
    return plan


def row_bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def default_group() -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise UserError("an exchange needs torch.distributed; call init_process_group first")
    group = dist.group.WORLD
    assert group is not None
    return group


def _record_event(tensor: torch.Tensor) -> Callable[[], None]:
    """A call that waits until the work that makes `tensor` on its device is done."""
    if not tensor.is_cuda:
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
