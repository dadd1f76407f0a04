"""What this project uses of torch that torch does not promise: named here once each, and looked for in this torch."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

import pipermoe

ROOT = Path(pipermoe.__file__).parent
PRIVATE = {  # name: why nothing public will do
    "torch.Tensor._make_subclass": "a fake tensor like another, faster than its constructor",
    "torch._dynamo": "imported once before ranks are forked: autograd would import it in every rank",
    "torch._foreach_norm": "the norms of many blocks in one kernel",
    "torch._subclasses.fake_tensor": "tensors without memory, for dry runs",
    "torch.ops.aten._grouped_mm": "counted by its operator",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "attention with sinks needs the log-sum-exp",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "the backward of the same",
    "torch.testing._internal.distributed.fake_pg": "a process group without processes, for dry runs",
    "torch.utils._python_dispatch": "operators seen one by one, to count bytes and FLOPs",
}


def is_private(name: str) -> bool:
    return name.startswith("torch.") and any(part[0] == "_" and part[:2] != "__" for part in name.split("."))


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`a.b.c` with its first name as `names` has it; empty for anything else."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def private_names(path: Path) -> set[str]:
    """Every private name of torch that a file imports or reaches for, also through `aten = torch.ops.aten`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, found = {"torch": "torch"}, set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found |= {alias.name for alias in aliases}
                names |= {alias.asname: alias.name for alias in aliases if alias.asname}
            case ast.ImportFrom(module=str(module), names=aliases):
                found.add(module)
                names |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in aliases}
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if is_torch(dotted(value, names)):
                names[target] = dotted(value, names)
    found |= {dotted(node, names) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in found if is_private(name)}


def is_torch(name: str) -> bool:
    return name.startswith("torch.")


def is_part_of(name: str, known: str) -> bool:
    return f"{name}.".startswith(f"{known}.")


USED = {name: path for path in ROOT.rglob("*.py") for name in private_names(path)}


def test_no_other_private_part_of_torch_is_used():
    unknown = {name: str(path) for name, path in USED.items() if not any(is_part_of(name, known) for known in PRIVATE)}
    assert not unknown


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_this_torch_has_what_is_used(name):
    found = torch
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    assert any(is_part_of(used, name) for used in USED), "not used any more: take it off the list"
