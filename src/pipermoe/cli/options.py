"""What several commands take: the annotations of common options, and the values behind them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pipermoe.specs.documents import load, validate
from pipermoe.specs.errors import UserError
from pipermoe.specs.platform import Platform
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import parse_bytes, parse_seconds

Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Switch = Annotated[bool, Parameter(negative="")]

JOB_OPTIONS = {"seq_len": "--seq-len", "global_batch_size": "--global-batch"}


def memory_bytes(text: str | None) -> int | None:
    """The value of `--memory`, such as "80GiB" or a number of bytes. Raises `UserError`."""
    if text is None:
        return None
    try:
        value = int(parse_bytes(text) if not text.isdigit() else text)  # type: ignore[call-overload]
    except ValueError as error:
        raise UserError(f"--memory = {text!r}: {error}") from None
    if value <= 0:
        raise UserError(f"--memory = {text!r}: must be positive")
    return value


def duration(option: str, text: str) -> float:
    """The seconds of an option such as `--mtbf 50000h`. Raises `UserError`."""
    try:
        seconds = float(parse_seconds(text))  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{option} = {text!r}: {error}") from None
    if seconds <= 0:
        raise UserError(f"{option} = {text!r}: must be above 0")
    return seconds


def numbers(option: str, text: str) -> list[int]:
    """The value of an option that takes several numbers above 0, such as "64,128,256". Raises `UserError`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} = {text!r}: must be numbers, such as 64,128,256") from None
    if min(values) < 1:
        raise UserError(f"{option} = {text!r}: every number must be at least 1")
    return values


def step_numbers(text: str | None) -> frozenset[int]:
    """The value of `--trace-steps`, such as "10,11". Raises `UserError`."""
    try:
        return frozenset(int(number) for number in (text or "").split(",") if number or text)
    except ValueError:
        raise UserError(f"--trace-steps = {text!r}: must be numbers of steps, such as 10,11") from None


def training_job(
    path: Path | None,
    seq_len: int | None,
    global_batch: int | None,
    precision: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The job file with the command line's values on top, or without a file these over `defaults`."""
    given = {"seq_len": seq_len, "global_batch_size": global_batch, "precision": precision}
    overrides = {key: value for key, value in given.items() if value is not None}
    if path is not None:
        return load(path, TrainConfig, overrides)
    data = {**(defaults or {}), **overrides}
    missing = [option for key, option in JOB_OPTIONS.items() if key not in data]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given, or a --job file that holds them")
    return validate(data, TrainConfig, where="command line")


def number_of_ranks(platform: Platform, ranks: int | None, nodes: int | None) -> int:
    """The value of `--gpus`, or all ranks of `--nodes` hosts; by default one host's. Raises `UserError`."""
    if ranks is not None and nodes is not None:
        raise UserError(f"--gpus {ranks} and --nodes {nodes}: give one of them")
    if nodes is not None and nodes < 1:
        raise UserError(f"--nodes = {nodes}: must be at least 1")
    return platform.host.ranks * (nodes or 1) if ranks is None else ranks
