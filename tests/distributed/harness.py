"""Run a function on N forked gloo processes with a hard timeout: a hang is a failure, never a hung test run."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes

# Autograd and optimizers import these two at their first call: here once, instead of a second in every forked rank.


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """`[function(rank, *arguments) for each rank]`, each in its own process with the default group initialised.

    Results travel through a pipe, so return plain data or CPU tensors. Raises AssertionError with the traceback of the
    first rank that failed, or naming the ranks that had not answered within `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [
            context.Process(target=_rank, args=(rank, world_size, store, function, arguments, answers, timeout))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(answers, processes, timeout)
        finally:
            for process in processes:
                process.join(timeout=0.5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _rank(rank, world_size, store, function, arguments, answers, timeout) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = function(rank, *arguments)
        dist.barrier()  # a rank that leaves early would close its connections under the others
        answers.put((rank, True, _plain(result)))
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
        answers.close()
        answers.join_thread()
        os._exit(1)


def _plain(value: Any) -> Any:
    """Tensors as NumPy arrays: torch would share them through file descriptors that die with the process."""
    if isinstance(value, torch.Tensor):
        return value.detach().numpy()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


def _collect(answers, processes, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(processes):
        try:
            rank, succeeded, value = answers.get(timeout=0.2)
        except queue.Empty:
            missing = [rank for rank in range(len(processes)) if rank not in results]
            died = [rank for rank in missing if processes[rank].exitcode not in (None, 0)]
            assert not died, f"ranks {died} died without an answer"
            assert time.monotonic() < deadline, f"ranks {missing} did not answer within {timeout} s"
            continue
        assert succeeded, f"rank {rank} failed:\n{value}"
        results[rank] = value
    return [results[rank] for rank in range(len(processes))]
