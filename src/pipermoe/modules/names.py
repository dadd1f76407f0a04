"""Global names of parameters, and what a name says: whose it is, and what it is gathered with.

`embedding.weight`, `layers.7.attention.query.weight`, `layers.7.router.weight`,
`layers.7.experts.gate_up.weight` (slots, D, 2 * width), `final_norm.weight`, `head.weight`, where D is the hidden size.
Layers of multi-token prediction are numbered on behind the last.
"""

from __future__ import annotations

EMBEDDING = "embedding.weight"


def is_expert(name: str) -> bool:
    """Whether the global name is that of routed experts' weights: sharded over ep, replicated over edp."""
    return ".experts." in name


def unit_of(name: str) -> str:
    """What is gathered together with the parameter of this global name: "layers.7", "embedding" or "head"."""
    parts = name.split(".")
    if parts[0] == "layers":
        return f"layers.{parts[1]}"
    return "head" if parts[0] == "final_norm" else parts[0]


def layer_of(name: str) -> int:
    """The layer of a parameter, or of a unit "layers.7"."""
    return int(name.split(".")[1])


def expert_name(name: str, expert: int) -> str:
    """What the part of the parameter `name` is called that belongs to this logical expert."""
    return f"{name}.{expert}"
