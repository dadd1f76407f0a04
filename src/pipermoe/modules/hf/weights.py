"""Weights from Hugging Face's safetensors files: each rank of any arrangement reads what it holds and no more.

Which tensor is called what is said in modules/hf/names.py; training/checkpoint/hf_weights.py writes them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipermoe.modules.hf.names import FAMILIES, Rule, Rules
from pipermoe.modules.model import StageModel
from pipermoe.modules.names import is_expert
from pipermoe.modules.weight_gradients import WeightGradients
from pipermoe.specs.documents import read_mapping
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NUMBERS = ("F32", "BF16", "F16", "F64")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
State = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of ours lies in theirs: full names of its parts, and the order of its outputs in them."""

    rule: Rule
    names: tuple[str, ...]
    order: Tensor | None

    def of_expert(self, expert: int) -> tuple[str, ...]:
        return tuple(name.format(expert=expert) for name in self.names)


def load_weights(folder: Path, model: ModelSpec, state: State, first_expert: int = 0) -> None:
    """Fill this rank's (global name, tensor) pairs from the weights in `folder`, whose config.json names the family.

    The first local expert is the logical expert `first_expert`. Raises `UserError` if the weights are of another model:
    a tensor is missing, superfluous or of another shape.
    """
    rules = _rules_of_same(folder, model)
    with Files(folder) as files:
        _check(files, model, rules)
        for name, tensor in state:
            place = place_of(name, model, rules)
            with torch.no_grad():
                tensor.copy_(_read(files, place, tensor, first_expert) if is_expert(name) else _joined(files, place))


def check_weights(folder: Path, model: ModelSpec) -> None:
    """Raise `UserError` unless `folder` holds all weights of `model`; no tensor is read."""
    with Files(folder) as files:
        _check(files, model, _rules_of_same(folder, model))


def _rules_of_same(folder: Path, model: ModelSpec) -> Rules:
    rules = rules_of(folder)
    check_same_model(folder / "config.json", ModelSpec.from_hf_config(folder), model)
    return rules


def rules_of(folder: Path) -> Rules:
    path = folder / "config.json"
    config = read_mapping(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        rule = f"its weights' names are not known; known: {', '.join(FAMILIES)}"
        raise UserError(describe_value(str(path), "model_type", family, rule))
    for key in ("rope_scaling", "rope_parameters"):
        stretch = config.get(key) or {}
        kind = stretch.get("rope_type") or stretch.get("type") or "default"
        if kind not in ("default", "yarn"):
            rule = "this runtime does not turn positions like that; default and yarn are accepted"
            raise UserError(describe_value(str(path), f"{key}.rope_type", kind, rule))
    return FAMILIES[family]


def _read(files: Files, place: Place, like: Tensor, first: int) -> Tensor:
    """The local experts' tensor, shaped as `like`."""
    if not place.rule.by_expert:
        held = files.rows(place.names[0], first, first + like.shape[0])
        return held if place.order is None else held[..., place.order]
    parts = [torch.cat([files.tensor(name) for name in place.of_expert(first + i)]) for i in range(like.shape[0])]
    return torch.stack([part.t() if part.ndim == 2 else part for part in parts])


def _joined(files: Files, place: Place) -> Tensor:
    value = torch.cat([files.tensor(name) for name in place.names])
    return value if place.order is None else value[place.order]


def named_parts(name: str, tensor: Tensor, model: ModelSpec, rules: Rules, first_expert: int = 0) -> dict[str, Tensor]:
    """Their tensors of one of ours, the reverse of loading; also of a gradient. Experts must be by expert or all."""
    place = place_of(name, model, rules)
    back = None if place.order is None else place.order.argsort()
    if not is_expert(name):
        value = tensor if back is None else tensor[back]
        return dict(zip(place.names, value.chunk(len(place.names)), strict=True))
    if not place.rule.by_expert:
        return {place.names[0]: tensor if back is None else tensor[..., back]}
    parts = {}
    for local, expert in enumerate(tensor):
        value = expert.t() if expert.ndim == 2 else expert
        names = place.of_expert(first_expert + local)
        parts.update(zip(names, value.chunk(len(names)), strict=True))
    return parts


def expected_shapes(model: ModelSpec, rules: Rules) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `model` has, with its shape."""
    with torch.device("meta"):
        whole = StageModel(model, range(model.num_layers), model.moe.num_experts, 1, torch.float32, WeightGradients())
    shapes = {}
    for name, tensor in whole.named_state():
        for theirs, part in named_parts(name, tensor, model, rules).items():
            shapes[theirs] = tuple(part.shape)
    return shapes


def place_of(name: str, model: ModelSpec, rules: Rules) -> Place:
    layer = _LAYER.match(name)
    local = name[layer.end() :] if layer else name
    if local not in rules:
        raise UserError(f"{model.name}: {name} has no name in this family's checkpoints; choose the model's own family")
    rule = rules[local]
    prefix = f"model.layers.{layer.group(1)}." if layer else ""
    return Place(rule, tuple(prefix + each for each in rule.theirs), rule.order(model) if rule.order else None)


def _check(files: Files, model: ModelSpec, rules: Rules) -> None:
    """Raise `UserError` at the first tensor that is missing, superfluous, quantised or of another shape."""
    expected = expected_shapes(model, rules)
    for name in expected:
        if name not in files.shapes:
            raise UserError(f"{files.where}: {name} is missing{_advice(name, model)}")
    for name, (shape, number) in files.shapes.items():
        where = files.path_of(name)
        if name not in expected:
            if not _is_known_extra(name, model):
                raise UserError(f"{where}: {name} is superfluous: {model.name} has no such tensor")
        elif number not in NUMBERS:
            raise UserError(f"{where}: {name} has the type {number}; convert it to one of {', '.join(NUMBERS[:3])}")
        elif shape != expected[name]:
            raise UserError(f"{where}: {name} has the shape {list(shape)}; {model.name} needs {list(expected[name])}")


def _advice(name: str, model: ModelSpec) -> str:
    """transformers leaves multi-token prediction out of what it writes, but not out of config.json."""
    if _is_behind(name, model):
        return ", of multi-token prediction: train without it by mtp_layers = 0 in the plan's model"
    return f"; these are not all weights of {model.name}"


def _is_behind(name: str, model: ModelSpec) -> bool:
    """Whether a tensor belongs to a layer of multi-token prediction, which follow the others."""
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= model.num_layers


def _is_known_extra(name: str, model: ModelSpec) -> bool:
    """What other programs save too: rotary tables, a tied head; of multi-token prediction copies of embedding and head,
    or all of it where the model is to be without."""
    tied = model.tie_word_embeddings and name == "lm_head.weight"
    copied = name.endswith((".embed_tokens.weight", ".shared_head.head.weight")) or not model.mtp_layers
    return name.endswith("rotary_emb.inv_freq") or tied or (_is_behind(name, model) and copied)


class Files:
    """The safetensors files of a folder: one, or several with an index. Their headers are read at once."""

    def __init__(self, folder: Path):
        self.where = folder
        self._open: dict[Path, Any] = {}
        self._path: dict[str, Path] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in _files_in(folder):
            handle = self._open[path] = _opened(path)
            for name in handle.keys():  # noqa: SIM118, the handle is no mapping
                header = handle.get_slice(name)
                self._path[name], self.shapes[name] = path, (tuple(header.get_shape()), header.get_dtype())

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()

    def path_of(self, name: str) -> Path:
        return self._path[name]

    def tensor(self, name: str) -> Tensor:
        return self._open[self._path[name]].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of the tensor, no others being read."""
        return self._open[self._path[name]].get_slice(name)[start:stop]


def _files_in(folder: Path) -> Iterator[Path]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        yield folder / SINGLE
        return
    try:
        table = json.loads(index.read_text())["weight_map"]
        names = sorted(set(table.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is not an index of weights: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: weight_map names {name!r}; a file of the same folder is accepted")
        yield folder / name


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def check_same_model(where: Path, saved: ModelSpec, wanted: ModelSpec) -> None:
    """Raise `UserError` where the weights' own config.json says another model than `wanted`, names aside."""
    for key in ModelSpec.model_fields:
        if key in ("name", "source", "mtp_layers"):
            continue
        theirs, ours = getattr(saved, key), getattr(wanted, key)
        if theirs != ours:
            raise UserError(f"{where}: {key} is {_shown(theirs)}; the plan has {_shown(ours)}")


def _shown(value: Any) -> str:
    return str(value.model_dump(exclude_defaults=True) if hasattr(value, "model_dump") else value)
