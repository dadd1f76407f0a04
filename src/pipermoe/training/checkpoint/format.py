"""How stretches of global vectors become files and come back: torch's distributed checkpoint (DCP) over safetensors.

Every rank writes one file of what it holds and reads whatever it needs from all of them, by DCP's own storage classes,
so that `torch.distributed.checkpoint` with a HuggingFaceStorageReader opens these files too. Two things are left out
on purpose. DCP's other storage keeps a table of contents as a pickle, which can run code when it is read; here each
file's header says in JSON what it holds. And `dcp.save` lets ranks agree on a plan by exchanging pickles, of which none
is needed: no two ranks hold the same element (`Optimizer.owned_parts`).
"""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pipermoe.specs.errors import UserError


@dataclass(frozen=True, slots=True)
class Piece:
    """The stretch of a global vector of `size` elements that starts at `offset`; this rank holds it as `values`."""

    values: Tensor
    size: int
    offset: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size((self.offset,)), self.values.shape)


Pieces = dict[str, Piece]


def write_pieces(folder: Path, pieces: Pieces, rank: int) -> None:
    """Write one file with the pieces of `rank` (CPU tensors) into `folder`, and wait until it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    writer, planner = HuggingFaceStorageWriter(str(folder), save_distributed=True), _SavePlanner()
    planner.set_up_planner(pieces)
    plan = dataclasses.replace(planner.create_local_plan(), storage_data={"shard_index": rank + 1})
    writer.write_data(plan, planner).wait()


def read_pieces(folder: Path, pieces: Pieces) -> None:
    """Fill the values of `pieces` in place from the files in `folder`.

    Raises `UserError` if those hold no vector of that name and size, or cannot be read.
    """
    reader, planner = HuggingFaceStorageReader(str(folder)), _LoadPlanner()
    try:
        metadata = reader.read_metadata()
        _check_holds(folder, metadata, pieces)
        planner.set_up_planner(pieces, metadata)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read: {type(error).__name__}: {error}") from None


def _check_holds(folder: Path, metadata: Metadata, pieces: Pieces) -> None:
    for name, piece in pieces.items():
        table = metadata.state_dict_metadata.get(name)
        if not isinstance(table, TensorStorageMetadata):
            raise UserError(f"{folder}: holds no {name}; it is not a checkpoint of this model")
        if tuple(table.size) != (piece.size,):
            raise UserError(f"{folder}: {name} has {table.size.numel():,} elements instead of {piece.size:,}")


class _SavePlanner(DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(name, piece) for name, piece in self.state_dict.items()])
        return self.plan

    @staticmethod
    def _item(name: str, piece: Piece) -> WriteItem:
        properties = TensorProperties.create_from_tensor(piece.values)
        data = TensorWriteData(chunk=piece.chunk, properties=properties, size=torch.Size((piece.size,)))
        return WriteItem(MetadataIndex(name, piece.chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].values

    def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.state_dict = state_dict


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, piece in self.state_dict.items():
            table = self.metadata.state_dict_metadata[name]
            assert isinstance(table, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, table, [piece.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].values

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")  # DCP would unpickle it
