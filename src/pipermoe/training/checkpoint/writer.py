"""Saving while training goes on: copy to the host, then write in a thread, then rename.

Ranks agree on success in a process group of its own, so that no collective of training can meet one of saving.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from pipermoe.exchange.executor.gather_json import all_gather_json
from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.specs.documents import save
from pipermoe.specs.errors import MachineError
from pipermoe.specs.plan import Plan
from pipermoe.training.checkpoint.format import Pieces, write_pieces
from pipermoe.training.checkpoint.store import (
    RECORD,
    CheckpointRecord,
    SavedLayout,
    checkpoints,
    partial_folder,
    pieces_of,
    pieces_of_biases,
)

KEPT = 3  # newest checkpoints that stay on disk


class CheckpointWriter:
    """Saves checkpoints of one run into `output`, one at a time. Collective: every rank makes one and calls the same.

    What goes wrong in the background is raised as `MachineError` by the next call, on every rank.
    """

    def __init__(self, output: Path, plan: Plan, text: str, groups: ProcessGroups) -> None:
        self._output, self._plan, self._text, self._groups = output, plan, text, groups
        if groups.rank == 0:  # what a killed run has left
            shutil.rmtree(partial_folder(output), ignore_errors=True)
        # Gloo also where training uses another backend: only small messages between hosts.
        agreement = dist.new_group(backend="gloo", group_desc="checkpoint")
        assert isinstance(agreement, dist.ProcessGroup)
        self._agreement = agreement
        self._thread: Thread | None = None
        self._error = ""

    def save(
        self,
        step: int,
        optimizer: Optimizer,
        biases: Iterable[tuple[str, Tensor]],
        layout: ExpertLayout | None = None,
    ) -> None:
        """Save the state after `step` steps; weights and moments may change as soon as this returns.

        Waits for the checkpoint before, if that is still being written. Older ones than the newest 3 go.
        """
        self.finish()
        pieces = pieces_of(optimizer.owned_parts())
        if self._groups.dp.rank() == 0:
            pieces |= pieces_of_biases(biases)
        copies = {name: replace(piece, values=piece.values.to("cpu", copy=True)) for name, piece in pieces.items()}
        self._thread = Thread(target=self._write, args=(step, copies, layout), name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error:
            raise MachineError(self._error)

    def _write(self, step: int, pieces: Pieces, layout: ExpertLayout | None) -> None:
        partial, rank = partial_folder(self._output), self._groups.rank
        try:
            self._together(step, lambda: write_pieces(partial, pieces, rank))
            self._together(step, lambda: self._complete(step, layout, partial) if rank == 0 else None)
        except Exception as error:  # of any rank, or one of them is gone
            self._error = str(error)
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _together(self, step: int, act: Callable[[], None]) -> None:
        """`act` on every rank; raises on all of them what it raised on the first one."""
        failure = ""
        try:
            act()
        except Exception as error:
            failure = f"rank {self._groups.rank}: checkpoint of step {step}: {type(error).__name__}: {error}"
        failures = [each for each in all_gather_json(failure, self._agreement) if each]
        if failures:
            raise MachineError(failures[0])

    def _complete(self, step: int, layout: ExpertLayout | None, partial: Path) -> None:
        plan, folder = self._plan, self._output / "checkpoints" / f"step-{step:06d}"
        record = CheckpointRecord(
            step=step,
            model=plan.model,
            train=plan.train,
            strategy=plan.strategy,
            text=self._text,
            layout=None if layout is None else SavedLayout(version=layout.version, slots=layout.slots_LNS.tolist()),
            files={path.name: path.stat().st_size for path in sorted(partial.iterdir())},
            software={"torch": torch.__version__},
        )
        save(partial / RECORD, record)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in checkpoints(self._output)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
