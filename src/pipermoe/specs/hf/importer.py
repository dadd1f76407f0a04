"""From a `config.json` to a ModelSpec: find the file and its text part, choose the family, or refuse by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pipermoe.specs.documents import read_mapping, validate
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.hf.families import FAMILIES
from pipermoe.specs.hf.reader import ConfigReader
from pipermoe.specs.hf.refusals import refuse_what_cannot_be_priced
from pipermoe.specs.model import ModelSpec

MAX_CONFIG_BYTES = 2 * 2**20  # the largest published configs are under 100 KiB

# Keys that change a count. A config that is read as an assumed family must not have one that the family ignores.
STRUCTURAL_KEYS = (
    "decoder_sparse_step",
    "first_k_dense_replace",
    "index_topk",
    "indexer_types",
    "interleave_moe_layer_step",
    "intermediate_size_mlp",
    "kv_lora_rank",
    "layer_types",
    "mlp_layer_types",
    "mlp_only_layers",
    "moe_intermediate_size",
    "moe_layer_freq",
    "moe_layer_interval",
    "moe_layers",
    "moe_num_shared_experts",
    "moe_shared_expert_intermediate_size",
    "n_shared_experts",
    "num_nextn_predict_layers",
    "num_shared_experts",
    "q_lora_rank",
    "share_expert_dim",
    "shared_expert_intermediate_size",
    "sliding_window",
    "use_bias",
    "use_qk_norm",
)


def read_config(path: str | Path, *, assume: str | None = None) -> ModelSpec:
    """The ModelSpec of a `config.json` (the file or its folder); `assume` names the family of an unknown type.

    Code that the file points to is never loaded. Raises `UserError`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    config, prefix = _text_part(read_mapping(path, limit_bytes=MAX_CONFIG_BYTES), str(path))
    refuse_what_cannot_be_priced(config, str(path))
    model_type = config.get("model_type")
    family = _family(config, str(path), assume)
    reader = ConfigReader(config, str(path), prefix)
    fields = FAMILIES[family](reader)
    if family != model_type:
        _refuse_ignored_structure(reader, family)
    identity = {"name": _name(config, path), "source": _source(path, model_type, family)}
    return validate(identity | fields, ModelSpec, where=str(path))


def _text_part(config: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The language model of a multimodal config and the prefix of its keys: what is trained here is text."""
    text = config.get("text_config")
    if text is None:
        return config, ""
    if not isinstance(text, dict):
        raise UserError(describe_value(where, "text_config", text, "must be a table of keys and values"))
    refuse_what_cannot_be_priced(config, where)
    outer = {key: config[key] for key in ("model_type", "auto_map", "tie_word_embeddings") if key in config}
    return outer | text, "text_config."


def _family(config: dict[str, Any], where: str, assume: str | None) -> str:
    """The family to read `config` as: its own type when known, else the assumed one."""
    model_type = config.get("model_type")
    if assume is not None and assume not in FAMILIES:
        close = difflib.get_close_matches(assume, FAMILIES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"--assume {assume}: unknown family; {hint}known: {', '.join(FAMILIES)}")
    if model_type is None and assume is None:
        raise UserError(f"{where}: model_type: required key is missing; or read it as a known family with --assume")
    if model_type is not None and not isinstance(model_type, str):
        raise UserError(describe_value(where, "model_type", model_type, "must be a text"))
    if model_type in FAMILIES and (assume is None or FAMILIES[assume] is FAMILIES[model_type]):
        return model_type
    if model_type in FAMILIES:
        raise UserError(describe_value(where, "model_type", model_type, f"is known; leave out --assume {assume}"))
    if assume is not None:
        return assume
    if config.get("auto_map"):
        rule = f"asks for remote code, which is never run, and model_type = {model_type!r} is not a known family"
        raise UserError(f"{where}: auto_map: {rule}; {_way_out()}")
    raise UserError(describe_value(where, "model_type", model_type, f"is not a known MoE family; {_way_out()}"))


def _way_out() -> str:
    return f"known: {', '.join(FAMILIES)}; if its layers are those of one of them, say so with --assume FAMILY"


def _refuse_ignored_structure(reader: ConfigReader, family: str) -> None:
    """An assumed family must account for every key that changes a count."""
    for key in STRUCTURAL_KEYS:
        if key not in reader.read and reader.raw(key):
            raise reader.error(key, f"changes the model, but family {family} does not know it; assume another")


def _name(config: dict[str, Any], path: Path) -> str:
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("/. "):
        return given.strip("/").rsplit("/", 1)[-1]
    return path.resolve().parent.name if path.name == "config.json" else path.stem.removesuffix("_config")


def _source(path: Path, model_type: object, family: str) -> str:
    return f"{path.name}, model_type {model_type}" + ("" if family == model_type else f", read as {family}")
