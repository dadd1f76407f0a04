"""How pieces of global tensors become DCP's files and come back: its documented planner and reader interfaces.

DCP keeps its table of contents as a pickle. It is read here by an unpickler that knows the handful of types such a
table consists of and refuses everything else, so that a foreign checkpoint cannot run code.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
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

TABLE = ".metadata"
_TABLE_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a global tensor of `shape` that starts at `offset` and that this rank holds as `values`."""

    values: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), self.values.shape)


class PieceSavePlanner(DefaultSavePlanner):
    """Writes a flat dictionary of pieces; the copies that several ranks hold are written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._write_item(name, piece) for name, piece in self.state_dict.items()])
        return self.plan

    @staticmethod
    def _write_item(name: str, piece: Piece) -> WriteItem:
        properties = TensorProperties.create_from_tensor(piece.values)
        data = TensorWriteData(chunk=piece.chunk, properties=properties, size=torch.Size(piece.shape))
        return WriteItem(MetadataIndex(name, piece.chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].values


class PieceLoadPlanner(DefaultLoadPlanner):
    """Reads whatever stretches of the saved chunks fall into this rank's pieces."""

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


class MetadataReader(FileSystemReader):
    """DCP's file reader with a table of contents that is data only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / TABLE
        try:
            with open(path, "rb") as file:
                metadata = _TableUnpickler(file).load()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # a damaged pickle fails in any way
            raise UserError(f"{path}: is not a checkpoint's table of contents: {error}") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path}: is not a checkpoint's table of contents but a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def check_holds(self, pieces: dict[str, Piece]) -> None:
        """Raise `UserError` unless the checkpoint has every tensor that `pieces` are parts of, in the same shape."""
        tables = self.read_metadata().state_dict_metadata
        for name, piece in pieces.items():
            table = tables.get(name)
            if not isinstance(table, TensorStorageMetadata):
                raise UserError(f"{self.path}: holds no tensor {name}; it is not a checkpoint of this model")
            if tuple(table.size) != piece.shape:
                raise UserError(f"{self.path}: {name} has the shape {list(table.size)}, not {list(piece.shape)}")


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _TABLE_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)
