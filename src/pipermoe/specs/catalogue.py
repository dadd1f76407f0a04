"""Resolve what a user calls a model to a ModelSpec: a catalogue name, a TOML file, a config.json or its folder."""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from pipermoe.specs.documents import load
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec


def load_model(reference: str, *, assume: str | None = None) -> ModelSpec:
    """The model that `reference` names.

    `reference` is a catalogue name (`mixtral-8x7b`), a `.toml` file of this project, a Hugging Face `config.json`, or a
    folder that holds one. `assume` reads a config.json of unknown `model_type` as that family.
    Raises `UserError`.
    """
    if looks_like_a_path(reference):
        path = Path(reference)
        if path.is_dir() or path.suffix == ".json":
            return ModelSpec.from_hf_config(path, assume=assume)
        return load(path, ModelSpec)
    entry = _folder("models") / f"{reference}.toml"
    if not entry.is_file():
        raise UserError(unknown_name(reference, model_names(), "model"))
    with resources.as_file(entry) as path:
        return load(path, ModelSpec)


def model_names() -> list[str]:
    """The names of the models in the catalogue, sorted."""
    return names_in("models")


def names_in(kind: str) -> list[str]:
    """The names of the entries of one kind of catalogue ("models"), sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder(kind).iterdir() if entry.name.endswith(".toml"))


def looks_like_a_path(reference: str) -> bool:
    """Whether `reference` means a file or folder: it has a separator, a known suffix, or there is a folder of it."""
    return "/" in reference or "\\" in reference or reference.endswith((".toml", ".json")) or Path(reference).is_dir()


def unknown_name(reference: str, names: list[str], kind: str) -> str:
    """One line: what was not found, what was perhaps meant, what else is accepted."""
    close = difflib.get_close_matches(reference.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else f"the catalogue has {', '.join(names)}; "
    return f"{kind} {reference!r}: not in the catalogue; {hint}or give the path of a .toml file or a config.json"


def _folder(kind: str) -> Traversable:
    return resources.files("pipermoe") / "catalogue" / kind
