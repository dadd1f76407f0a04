"""Gloo processes that stay alive and answer question after question, so that hypothesis can ask many."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ANSWER_SECONDS = 60


class LiveRanks:
    """`start(rank)` makes, in every forked process, the function that answers."""

    def __init__(self, start: Callable[[int], Callable[..., Any]], size: int):
        self._start, self._size = start, size

    def __enter__(self) -> LiveRanks:
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(rank, theirs))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def ask(self, ranks: Sequence[int], *question: Any) -> list[Any]:
        """What those ranks answer, all asked at once; the traceback of one that raises, None of one that is silent."""
        for rank in ranks:
            self._pipes[rank].send(question)
        return [self._pipes[rank].recv() if self._pipes[rank].poll(ANSWER_SECONDS) else None for rank in ranks]

    def _serve(self, rank: int, pipe) -> None:
        torch.set_num_threads(1)
        store = f"file://{Path(self._folder.name) / 'store'}"
        limit = timedelta(seconds=ANSWER_SECONDS)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=self._size, timeout=limit)
        answer = self._start(rank)
        while True:
            question = pipe.recv()
            try:
                pipe.send(answer(*question))
            except Exception:
                pipe.send(traceback.format_exc())
