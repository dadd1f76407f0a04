"""A DeepSpeed configuration as a plan."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipermoe.export.deepspeed.config import BACKENDS
from pipermoe.export.deepspeed.names import EXPERT_PARALLEL, IGNORED, OURS, WRITTEN
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.documents import read_mapping, validate
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.runtimes.deepspeed import TARGET
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


def read(path: Path, world_size: int, model: str | None = None, seq_len: int | None = None) -> Configuration:
    """The configuration in the file `path`; a file that this package did not write says neither model nor `seq_len`."""
    given, where = read_mapping(path), str(path)
    check_keys(given, where)
    ours = _section(given, OURS, where)
    name, seq_len = model or ours.get("model"), seq_len or ours.get("seq_len")
    if name is None or seq_len is None:
        raise UserError(f"{where}: names no model and no sequence length: give --model and --seq-len")
    remarks = [f"{key}: has no counterpart here" for key in given if key in IGNORED]
    strategy = validate(_strategy(given, world_size, where), Strategy, where)
    train = validate(_train(given, seq_len, strategy, where), TrainConfig, where)
    return Configuration(model=load_model(name), train=train, strategy=strategy, remarks=tuple(remarks))


def check_keys(given: dict[str, Any], where: str) -> None:
    """UserError for a section, or a key of expert_parallel, that DeepSpeed would ignore."""
    _require_known(given, (*WRITTEN, *IGNORED, OURS), where, "")
    _require_known(_section(given, "expert_parallel", where), EXPERT_PARALLEL, where, "expert_parallel.")


def _require_known(given: Iterable[str], known: tuple[str, ...], where: str, prefix: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise UserError(f"{where}: {prefix}{key}: {TARGET} does not know this key and would ignore it{hint}")


def _section(given: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    section = given.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(describe_value(where, name, section, "must be a table of keys and values"))
    return section


def _strategy(given: dict[str, Any], world_size: int, where: str) -> dict[str, Any]:
    experts, ours = _section(given, "expert_parallel", where), _section(given, OURS, where)
    tensor_parallel = _number(_section(given, "tensor_parallel", where), "autotp_size", 1, where) or 1
    expert_parallel = _number(experts, "autoep_size", 1, where) if experts.get("enabled") else 1
    if world_size % tensor_parallel or world_size % expert_parallel:
        rule = f"must be a multiple of autotp_size = {tensor_parallel} and of autoep_size = {expert_parallel}"
        raise UserError(describe_value("", "--world-size", world_size, rule))
    level = _section(given, "zero_optimization", where).get("stage", 0)
    data_parallel, expert_data_parallel = world_size // tensor_parallel, world_size // expert_parallel
    backend = experts.get("comm_backend", "comm")
    return {
        "data_parallel": data_parallel,
        "tensor_parallel": tensor_parallel,
        "expert_parallel": expert_parallel,
        "expert_data_parallel": expert_data_parallel,
        "micro_batch_size": _micro_batch(given, data_parallel, where),
        "dispatcher": next((ours for ours, theirs in BACKENDS.items() if theirs == backend), backend),
        "recompute": "full" if ours.get("gradient_checkpointing") else "none",
        "zero_dense": level if data_parallel > 1 else 0,
        "zero_expert": level if expert_data_parallel > 1 else 0,
    }


def _number(section: dict[str, Any], key: str, default: int, where: str) -> int:
    value = section.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(describe_value(where, key, value, "must be a whole number; values such as 'auto' are not read"))
    return value


def _micro_batch(given: dict[str, Any], data_parallel: int, where: str) -> int:
    """DeepSpeed takes any two of batch, micro-batch and accumulation; their product must fit."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    batch, micro, steps = (_number(given, name, 0, where) for name in names)
    if not micro and batch:
        micro = batch // ((steps or 1) * data_parallel)
    if not batch:
        batch = micro * (steps or 1) * data_parallel
    steps = steps or batch // max(1, micro * data_parallel)
    if not micro or micro * steps * data_parallel != batch:
        rule = f"must be train_micro_batch_size_per_gpu * gradient_accumulation_steps * {data_parallel} ranks"
        raise UserError(describe_value(where, "train_batch_size", batch, rule))
    return micro


def _real(section: dict[str, Any], key: str, default: float, where: str) -> float:
    value = section.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(describe_value(where, key, value, "must be a number; values such as 'auto' are not read"))
    return value


def _train(given: dict[str, Any], seq_len: int, strategy: Strategy, where: str) -> dict[str, Any]:
    ours = _section(given, OURS, where)
    optimizer = _section(_section(given, "optimizer", where), "params", where)
    schedule = _section(_section(given, "scheduler", where), "params", where)
    steps = given.get("gradient_accumulation_steps") or 1
    rate = _real(optimizer, "lr", 1e-3, where)
    betas = optimizer.get("betas", (0.9, 0.999))
    if len(betas) != 2:
        raise UserError(describe_value(where, "betas", betas, "must be two numbers"))
    enabled = [name for name in ("bf16", "fp16") if _section(given, name, where).get("enabled")]
    return {
        "seq_len": seq_len,
        "global_batch_size": given.get("train_batch_size")
        or strategy.micro_batch_size * steps * strategy.data_parallel,
        "steps": ours.get("steps", schedule.get("total_num_steps", 100)),
        "precision": enabled[0] if enabled else "fp32",
        "optimizer": {
            "learning_rate": rate,
            "minimum_learning_rate": float(f"{rate * _real(schedule, 'cos_min_ratio', 0.0, where):.12g}"),
            "warmup_steps": schedule.get("warmup_num_steps", 0),
            "beta1": betas[0],
            "beta2": betas[1],
            "epsilon": optimizer.get("eps", 1e-8),
            "weight_decay": optimizer.get("weight_decay", 0.0),
            "gradient_clip": given.get("gradient_clipping", 0.0),
        },
    }
