"""Resolve what a user calls a model to a ModelSpec: a catalogue name, a TOML file, a config.json or its folder."""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from pipermoe.specs.documents import load
from pipermoe.specs.errors import UserError, either
from pipermoe.specs.model import ModelSpec


def load_model(reference: str, *, assume: str | None = None) -> ModelSpec:
    """The model that `reference` names.

    `reference` is a catalogue name (`mixtral-8x7b`), a `.toml` file of this project, a Hugging Face `config.json`, or a
    folder that holds one; a name of the catalogue wins over a folder of the same name. `assume` reads a config.json of
    unknown `model_type` as that family. Raises `UserError`.
    """
    name, path = reference.lower(), Path(reference)
    if name in model_names():
        if assume is not None:
            raise UserError(f"--assume {assume}: {name} is a catalogue entry; --assume is for a config.json")
        with resources.as_file(_folder("models") / f"{name}.toml") as entry:
            return load(entry, ModelSpec)
    if path.is_dir() or path.suffix == ".json":
        return ModelSpec.from_hf_config(path, assume=assume)
    if not looks_like_a_path(reference):
        raise UserError(unknown_name(reference, model_names(), "model", files="a .toml file or a config.json"))
    if not path.exists():
        raise UserError(unknown_name(path.name, model_names(), "model", missing=reference))
    if assume is not None:
        raise UserError(f"{reference}: --assume {assume} is for a config.json, not for a .toml file")
    return load(path, ModelSpec)


def is_catalogue_entry(model: ModelSpec) -> bool:
    """Whether the catalogue has this model, under its name and with its sizes."""
    if model.name not in model_names():
        return False
    return load_model(model.name).model_copy(update={"source": model.source}) == model


def model_names() -> list[str]:
    """The names of the models in the catalogue, sorted."""
    return names_in("models")


def names_in(kind: str) -> list[str]:
    """The names of the entries of one kind of catalogue ("models"), sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder(kind).iterdir() if entry.name.endswith(".toml"))


def looks_like_a_path(reference: str) -> bool:
    """Whether `reference` means a file: it has a separator or a known suffix."""
    return "/" in reference or "\\" in reference or reference.endswith((".toml", ".json"))


def unknown_name(reference: str, names: list[str], kind: str, *, files: str = "", missing: str = "") -> str:
    """One line: what was not found, what was perhaps meant, which `files` are accepted instead."""
    stem = reference.lower().removesuffix(".toml")
    close = difflib.get_close_matches(stem, names, n=3, cutoff=0.5)
    if missing:
        return f"{missing}: no such file" + (f"; did you mean the catalogue's {either(close)}?" if close else "")
    hint = f"did you mean {either(close)}? " if close else f"the catalogue has {', '.join(names)}; "
    way_out = f"{hint}or give the path of {files}" if files else hint.rstrip("; ")
    return f"{kind} {reference!r}: not in the catalogue; {way_out}"


def _folder(kind: str) -> Traversable:
    return resources.files("pipermoe") / "catalogue" / kind
