"""torchtitan itself as the judge of modules: its ConfigManager, its meshes, and a whole Trainer for pretended ranks.

Importing this module imports torchtitan 0.3.0 on a machine without a GPU and triton: a CPU stands in for the device.
Use it in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

warnings.filterwarnings("ignore")


class _AnyFunction(types.ModuleType):
    """A module of kernels, none of which runs here."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


class _Device(types.ModuleType):
    """torch.cpu with the few functions that torchtitan asks of an accelerator."""

    properties = types.SimpleNamespace(total_memory=80 << 30, name="CPU")
    answers = {
        "get_device_name": "CPU",
        "get_device_properties": properties,
        "memory_stats": {},
        "device_count": 1,
        "memory_reserved": 0,
    }

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        return lambda *arguments, **options: self.answers.get(name)


sys.modules["torchtitan.distributed.minimal_async_ep.kernels"] = _AnyFunction("kernels")  # imports triton
_device = _Device("device")
torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[attr-defined]
torch._utils._get_device_module = lambda kind: _device  # type: ignore[attr-defined]

ConfigManager = importlib.import_module("torchtitan.config").ConfigManager
ParallelDims = importlib.import_module("torchtitan.distributed").ParallelDims


def accept(folder: Path, extra: tuple[str, ...] = ()):
    """torchtitan's configuration of the module pipermoe_plan.py in `folder`."""
    sys.modules.pop("pipermoe_plan", None)
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        return ConfigManager().parse_args(["--module", "pipermoe_plan", "--config", "plan", *extra])
    finally:
        sys.path.remove(str(folder))


def rank_groups(config, world_size: int) -> dict[str, set[tuple[int, ...]]]:
    """torchtitan's rank groups along its axes, over a fake process group, seen from every rank."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            dims = ParallelDims.from_config(config.parallelism, world_size)
            dims.build_mesh()
            for axis in ("pp", "cp", "tp", "ep", "efsdp"):
                mesh = dims.get_optional_mesh(axis)
                if mesh is not None:
                    found.setdefault(axis, set()).add(tuple(mesh.mesh.flatten().tolist()))
        finally:
            dist.destroy_process_group()
    return found


def parameters(config) -> int:
    """The number of parameters of the registered model."""
    with torch.device("meta"):
        return sum(p.numel() for p in config.model_spec.model.build().parameters())


def write_assets(folder: Path) -> None:
    """The tokenizer and text that the debug models read from the folder they are started in."""
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    assets = folder / "tests" / "assets"
    for name in ("tokenizer", "c4_test"):
        (assets / name).mkdir(parents=True)
    tokenizer.save(str(assets / "tokenizer" / "tokenizer.json"))
    (assets / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (assets / "c4_test" / "data.json").write_text('{"text": "words"}\n' * 64)


def pipeline_order(config, world_size: int) -> list[list[str]]:
    """The actions of every pipeline rank, after building the whole Trainer of one of `world_size` pretended ranks:
    model, parallelism, schedule, optimizer, data loader."""
    os.environ.update(NGPU=str(world_size), WORLD_SIZE=str(world_size), RANK="0", LOCAL_RANK="0")
    try:
        trainer = config.build()
        return [[str(action) for action in row if action] for row in trainer.pp_schedule.pipeline_order.values()]
    finally:
        dist.destroy_process_group()
