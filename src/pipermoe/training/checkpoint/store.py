"""Checkpoints that any arrangement can resume: weights and moments by global name, each a flat fp32 vector.

A checkpoint is a folder `checkpoints/step-000100`. It grows under a temporary name and is renamed when every rank's
file is on disk, so a folder that is there is whole. `checkpoint.json` says what is in it and how long each file is.

Routed experts are stored by logical id, each in vectors of its own. Neither the degrees, the ZeRO levels nor the expert
layout of the run that resumes have to be those of the run that saved. Beside these vectors only the step is kept: the
learning rate, the order of the data and every random draw are functions of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import Tensor

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.runtime.optimizer.adamw import Optimizer, Part
from pipermoe.specs.base import Frozen
from pipermoe.specs.documents import load
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig
from pipermoe.training.checkpoint.format import Piece, Pieces, read_pieces

RECORD = "checkpoint.json"
_FOLDER = re.compile(r"step-(\d{6,})")


class SavedLayout(Frozen):
    """Which expert lay in every MoE layer, rank and slot; -1 where none did."""

    version: int
    slots: tuple[tuple[tuple[int, ...], ...], ...]


class CheckpointRecord(Frozen):
    """What a checkpoint holds; `files` maps the name of every other file in the folder to its size in bytes.

    `text` is the fingerprint of what the run reads (data/batches.py). `layout` is that of experts that move: whoever
    resumes with as many ranks and slots goes on from it.
    """

    step: int = Field(ge=1)
    model: ModelSpec
    train: TrainConfig
    strategy: Strategy
    text: str
    layout: SavedLayout | None = None
    files: dict[str, int]
    software: dict[str, str] = {}


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = [path for path in (output / "checkpoints").glob("step-*") if _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


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


def check_same_text(folder: Path, text: str, source: str) -> None:
    """Raise `UserError` unless the saved run has read the text of this fingerprint, which comes from `source`."""
    if load(folder / RECORD, CheckpointRecord).text != text:
        raise UserError(
            f"{folder / RECORD}: the run has read another text than {source} holds now: the steps would see other "
            "data; resume with the text as it was, or train into another --output"
        )


def saved_layout(folder: Path) -> ExpertLayout | None:
    """Where the experts lay when the checkpoint was saved, if they moved."""
    record = load(folder / RECORD, CheckpointRecord)
    if record.layout is None:
        return None
    return ExpertLayout(np.array(record.layout.slots), record.model.moe.num_experts, record.layout.version)


def load_checkpoint(folder: Path, plan: Plan, optimizer: Optimizer, biases: Iterable[tuple[str, Tensor]]) -> int:
    """Fill weights, moments and correction biases in place; returns the number of steps done.

    Collective: every rank calls it.
    """
    record = check_resumable(folder, plan)
    pieces = pieces_of(optimizer.updated_parts())
    pieces |= pieces_of_biases(biases)
    read_pieces(folder, pieces)
    optimizer.gather_weights()
    optimizer.steps_done = record.step
    return record.step


def partial_folder(output: Path) -> Path:
    """Where a checkpoint grows before it is whole; what a killed run leaves behind, the next one removes."""
    return output / "checkpoints" / ".partial"


def pieces_of(parts: Iterable[Part]) -> Pieces:
    """The stretches of global vectors that these parts of a rank's parameters are, by their names in the checkpoint."""
    return {f"{part.kind}.{part.span.name}": Piece(part.values, part.whole, part.span.start) for part in parts}


def pieces_of_biases(biases: Iterable[tuple[str, Tensor]]) -> Pieces:
    return {f"weights.{name}": Piece(bias, bias.numel(), 0) for name, bias in biases}


def _must_agree(folder: Path, key: str, saved: object, wanted: object) -> None:
    if saved != wanted:
        raise UserError(
            f"{folder / RECORD}: {key} = {saved!r}: the plan has {wanted!r}; resume with the plan of the saved run"
        )
