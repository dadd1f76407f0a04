"""Megatron-LM itself as the judge of arguments: its parser, its validators, its configuration, its process groups.

Importing this module imports megatron-core 0.19.2 on a machine without a GPU, Transformer Engine and triton: it answers
for those in the place of a recent GPU, and changes nothing else. Use it in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import typing_extensions
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipermoe.specs.mesh import Axis

warnings.filterwarnings("ignore")
typing.override = typing_extensions.override  # type: ignore[attr-defined]  # the package asks for Python 3.12


class _AnyFunction(types.ModuleType):
    """A module of kernels, none of which runs here."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = _AnyFunction("paged_stash")  # imports triton
torch.cuda.get_device_capability = lambda *arguments, **options: (9, 0)  # a Hopper GPU
torch.cuda.get_device_properties = lambda *arguments, **options: types.SimpleNamespace(major=9, minor=0)

arguments = importlib.import_module("megatron.training.arguments")
parallel_state = importlib.import_module("megatron.core.parallel_state")
memory = importlib.import_module("megatron.training.theoretical_memory_usage")

for name in ("megatron.core.utils", "megatron.core.transformer.transformer_config", "megatron.training.arguments"):
    importlib.import_module(name).is_te_min_version = lambda *versions, **options: True  # type: ignore[attr-defined]
arguments._print_args = lambda *words, **options: None  # type: ignore[attr-defined]

GROUPS: dict[Axis, Callable] = {
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "dp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=False),
    "cp": parallel_state.get_context_parallel_group,
    "tp": parallel_state.get_tensor_model_parallel_group,
    "edp": parallel_state.get_expert_data_parallel_group,
    "ep": parallel_state.get_expert_model_parallel_group,
    "etp": parallel_state.get_expert_tensor_parallel_group,
}


def registered_options() -> dict[str, str]:
    """Every option of the parser and its key in the namespace."""
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
    return {flag: action.dest for flag, action in parser._option_string_actions.items() if action.dest != "help"}


def accept(words: Iterable[str], world_size: int, environment: dict[str, str]):
    """Megatron's namespace of a command line. Raises what Megatron raises: SystemExit for an unknown option, ..."""
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    os.environ.update(environment, WORLD_SIZE=str(world_size), RANK="0", LOCAL_RANK="0")
    sys.argv = ["pretrain_gpt.py", *words]
    parsed = arguments.validate_args(arguments.parse_args())
    # Kernels of Transformer Engine, which is not here.
    parsed.apply_rope_fusion = parsed.moe_permute_fusion = False
    arguments.core_transformer_config_from_args(parsed)
    return parsed


def rank_groups(parsed, world_size: int) -> dict[Axis, set[tuple[int, ...]]]:
    """Megatron's own rank groups along every axis, over a fake process group, seen from every rank."""
    found: dict[Axis, set[tuple[int, ...]]] = {axis: set() for axis in GROUPS}
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parsed.tensor_model_parallel_size,
                pipeline_model_parallel_size=parsed.pipeline_model_parallel_size,
                context_parallel_size=parsed.context_parallel_size,
                expert_model_parallel_size=parsed.expert_model_parallel_size,
                expert_tensor_parallel_size=parsed.expert_tensor_parallel_size,
                create_gloo_process_groups=False,
                order="tp-cp-ep-pp-dp" if parsed.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            )
            for axis, ranks in _groups_of_this_rank():
                found[axis].add(ranks)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return found


def _groups_of_this_rank() -> Iterator[tuple[Axis, tuple[int, ...]]]:
    for axis, group in GROUPS.items():
        yield axis, tuple(dist.get_process_group_ranks(group()))


def weight_and_optimizer_bytes(parsed) -> float:
    """What `report_theoretical_memory` says about weights, gradients and optimizer state of the most loaded rank."""
    return memory.compute_weight_and_optimizer_memory(parsed)
