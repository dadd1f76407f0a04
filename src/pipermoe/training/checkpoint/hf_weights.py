"""Weights in Hugging Face's safetensors files, written by all ranks: each one file of what no other rank writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from pipermoe.exchange.executor.gather_json import all_gather_json
from pipermoe.modules.hf.weights import INDEX, State, named_parts, place_of, rules_of
from pipermoe.modules.names import EMBEDDING, is_expert
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.model import ModelSpec


def save_weights(folder: Path, model: ModelSpec, like: Path, state: State, groups: ProcessGroups) -> None:
    """Write the weights into `folder` as those in the folder `like` are named, with its config.json. Collective.

    Each pipeline and expert-parallel rank writes one file; rank 0 the index, last, so that a folder with an index is
    whole.
    """
    rules, here = rules_of(like), groups.coordinates
    held: dict[str, Tensor] = {}
    for name, tensor in state:
        value, writes = tensor.detach(), (groups.edp if is_expert(name) else groups.dp).rank() == 0
        writes = writes and not (name == EMBEDDING and groups.ends.rank())  # the last stage may hold a copy
        if is_expert(name) and not place_of(name, model, rules).rule.by_expert:
            value, writes = _all_experts(value, groups), writes and here.ep == 0
        if writes:
            held |= named_parts(name, value, model, rules, here.ep * value.shape[0] if is_expert(name) else 0)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: value.numel() * value.element_size() for name, value in held.items()}
    writers: list[dict[str, int]] = all_gather_json(sizes, groups.world)
    ranks = [rank for rank, written in enumerate(writers) if written]
    files = {rank: f"model-{i + 1:05d}-of-{len(ranks):05d}.safetensors" for i, rank in enumerate(ranks)}
    if held:
        contiguous = {name: value.cpu().contiguous().clone() for name, value in held.items()}
        save_file(contiguous, folder / files[groups.rank], metadata={"format": "pt"})
    dist.barrier(groups.world)
    if groups.rank == 0:
        total = sum(size for written in writers for size in written.values())
        table = {name: files[rank] for rank in ranks for name in writers[rank]}
        shutil.copyfile(like / "config.json", folder / "config.json")
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    dist.barrier(groups.world)


def _all_experts(local: Tensor, groups: ProcessGroups) -> Tensor:
    """The experts of all ranks of the expert-parallel group in one tensor."""
    parts = [torch.empty_like(local) for _ in range(groups.ep.size())]
    dist.all_gather(parts, local.contiguous(), group=groups.ep)
    return torch.cat(parts)
