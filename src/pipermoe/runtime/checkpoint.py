"""Checkpoints that any arrangement can resume: weights and moments by global name, in torch's distributed format (DCP).

A checkpoint is a folder `checkpoints/step-000100`. It is written under a temporary name and renamed when every rank's
file is on disk, so a folder that is there is whole. `checkpoint.json` says what is in it and how long each file is.

Routed experts are stored by logical id: one global tensor of all E experts, of which a rank holds consecutive ones.
Moments are stored flat, one global vector per parameter, of which a ZeRO-1 rank holds some stretch. So neither the
degrees nor the ZeRO level of the run that resumes have to be those of the run that saved.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_pieces
from torch.distributed.checkpoint.state_dict_saver import save as save_pieces

from pipermoe.runtime.checkpoint_format import MetadataReader, Piece, PieceLoadPlanner, PieceSavePlanner
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer import Optimizer
from pipermoe.runtime.weights import is_expert
from pipermoe.specs.base import Frozen
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

KEPT = 3  # newest checkpoints that stay on disk
RECORD = "checkpoint.json"
_FOLDER = re.compile(r"step-(\d{6,})")


class CheckpointRecord(Frozen):
    """What a checkpoint holds; `files` maps the name of every other file in the folder to its size in bytes."""

    step: int = Field(ge=1)
    model: ModelSpec
    train: TrainConfig
    strategy: Strategy
    files: dict[str, int]
    software: dict[str, str] = {}


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = [path for path in (output / "checkpoints").glob("step-*") if _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def find_newest(output: Path) -> Path:
    found = checkpoints(output)
    if not found:
        raise UserError(f"{output / 'checkpoints'}: holds no checkpoint to resume from; train without --resume")
    return found[-1]


def check_resumable(folder: Path, plan: Plan) -> CheckpointRecord:
    """The record of the checkpoint in `folder`. Raises `UserError` if it is damaged or of another job than `plan`'s."""
    record = load(folder / RECORD, CheckpointRecord)
    for name, size in record.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; the checkpoint is not whole")
        if path.stat().st_size != size:
            raise UserError(f"{path}: is {path.stat().st_size:,} bytes instead of {size:,}; the checkpoint is damaged")
    for key in ModelSpec.model_fields:
        _must_agree(folder, f"model.{key}", getattr(record.model, key), getattr(plan.model, key))
    for key in ("seq_len", "global_batch_size", "seed", "data", "precision"):  # else the steps would see other data
        _must_agree(folder, f"train.{key}", getattr(record.train, key), getattr(plan.train, key))
    return record


def save_checkpoint(
    output: Path,
    step: int,
    plan: Plan,
    named_state: Iterable[tuple[str, Tensor]],
    optimizer: Optimizer,
    groups: ProcessGroups,
) -> Path:
    """Save the state after `step` steps. Collective: every rank calls it. Older checkpoints than the newest 3 go."""
    folder = output / "checkpoints" / f"step-{step:06d}"
    partial = partial_folder(output)
    if groups.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(groups.world)
    pieces = _pieces(named_state, optimizer, groups, plan)
    save_pieces(pieces, storage_writer=FileSystemWriter(partial), planner=PieceSavePlanner())
    if groups.rank == 0:
        record = CheckpointRecord(
            step=step,
            model=plan.model,
            train=plan.train,
            strategy=plan.strategy,
            files={path.name: path.stat().st_size for path in sorted(partial.iterdir())},
            software={"torch": torch.__version__},
        )
        save(partial / RECORD, record)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in checkpoints(output)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def load_checkpoint(
    folder: Path,
    plan: Plan,
    named_state: Iterable[tuple[str, Tensor]],
    optimizer: Optimizer,
    groups: ProcessGroups,
) -> int:
    """Fill weights and moments in place; returns the number of steps done. Collective: every rank calls it."""
    record = check_resumable(folder, plan)
    pieces = _pieces(named_state, optimizer, groups, plan)
    reader = MetadataReader(folder)
    reader.check_holds(pieces)
    try:
        load_pieces(pieces, storage_reader=reader, planner=PieceLoadPlanner())
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder}: cannot be read: {first}") from None
    optimizer.steps_done = record.step
    return record.step


def partial_folder(output: Path) -> Path:
    """Where a checkpoint grows before it is whole; what a killed run leaves behind, the next one removes."""
    return output / "checkpoints" / ".partial"


def _pieces(
    named_state: Iterable[tuple[str, Tensor]], optimizer: Optimizer, groups: ProcessGroups, plan: Plan
) -> dict[str, Piece]:
    """What this rank holds of every global tensor, under the tensor's name in the checkpoint."""
    pieces: dict[str, Piece] = {}
    elements: dict[str, tuple[int, int]] = {}  # name -> (the global parameter's elements, the first held here)
    for name, parameter in named_state:
        local, first = tuple(parameter.shape), 0
        shape = local
        if is_expert(name):
            first = groups.coordinates.ep * local[0]
            shape = (plan.model.moe.num_experts, *local[1:])
        offset = (first, *(0 for _ in local[1:]))
        pieces[f"weights.{name}"] = Piece(parameter.detach(), shape, offset)
        row = parameter[0].numel()
        elements[name] = shape[0] * row, first * row
    for moment, part, values in optimizer.moment_parts():
        total, start = elements[part.name]
        pieces[f"{moment}.{part.name}"] = Piece(values, (total,), (start + part.start,))
    return pieces


def _must_agree(folder: Path, key: str, saved: object, wanted: object) -> None:
    if saved != wanted:
        raise UserError(
            f"{folder / RECORD}: {key} = {saved!r}: the plan has {wanted!r}; resume with the plan of the saved run"
        )
