"""What several commands take: their common options with the words of `--help`, and the values behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from pipermoe.specs.documents import load, validate
from pipermoe.specs.errors import UserError
from pipermoe.specs.platform import Platform
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from pipermoe.planner.job import Limits


def _drawable(_: object, path: Path | None) -> None:
    """Asked before the work whose result is to be drawn."""
    from pipermoe.report.picture import require_drawable

    if path is not None:
        require_drawable(path)


Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Plot = Annotated[Path, Parameter(validator=_drawable)]
Switch = Annotated[bool, Parameter(negative="")]
ModelName = Annotated[
    str, Parameter(help="A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.")
]
PlatformName = Annotated[
    str, Parameter(help="A machine of the catalogue (docs/platforms.md) or a platform file (pipermoe measure).")
]
JobFile = Annotated[
    Path | None,
    Parameter(help="The training job (TOML): batch, sequence, optimizer, data. Options below override it."),
]
Precision = Annotated[
    str | None,
    Parameter(help="fp32, bf16, fp16 or fp8. Default without a job: bf16 where the device is faster in it than fp32."),
]
Runtime = Annotated[
    Literal["pipermoe", "megatron", "torchtitan", "deepspeed", "any"],
    Parameter(
        help="What has to execute the plan: pipermoe's own runtime, or, as a job of `pipermoe export`, Megatron-LM, "
        "torchtitan or DeepSpeed; or any of them."
    ),
]

JOB_OPTIONS = {"seq_len": "--seq-len", "global_batch_size": "--global-batch"}


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """The training job of a command: a file, and values of the command line over it."""

    job: JobFile = None
    seq_len: Annotated[int | None, Parameter(help="Tokens in a sequence.")] = None
    global_batch: Annotated[int | None, Parameter(help="Sequences in a step.")] = None
    precision: Precision = None

    def train(self, platform: Platform | None = None) -> TrainConfig:
        """The job, by default in the precision that is usual on `platform`. Raises `UserError`."""
        defaults = {} if platform is None else {"precision": platform.usual_precision}
        return training_job(self.job, self.seq_len, self.global_batch, self.precision, defaults)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """The memory of a rank, and how unevenly tokens choose experts."""

    memory: Annotated[
        str | None, Parameter(help="Memory budget of one rank, for example 80GiB. Default: the platform's.")
    ] = None
    headroom: Annotated[
        float, Parameter(help="Per cent of that budget that plans leave free: real routing is never even.")
    ] = 5.0
    imbalance: Annotated[float, Parameter(help="Rows of the busiest rank over the mean; 1 is balanced routing.")] = 1.0

    def limits(self) -> Limits:
        """Raises `UserError`."""
        return {
            "memory_budget_bytes": memory_bytes(self.memory),
            "headroom": self.headroom / 100,
            "imbalance": self.imbalance,
        }


NO_JOB, NO_LIMITS = JobOptions(), LimitOptions()


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
        raise UserError(f"{' and '.join(missing)} must be given, on the command line or in a --job file")
    return validate(data, TrainConfig, where="command line")


def number_of_ranks(platform: Platform, ranks: int | None, nodes: int | None) -> int:
    """The value of `--ranks`, or all ranks of `--nodes` hosts; by default one host's. Raises `UserError`."""
    if ranks is not None and nodes is not None:
        raise UserError(f"--ranks {ranks} and --nodes {nodes}: give one of them")
    if nodes is not None and nodes < 1:
        raise UserError(f"--nodes = {nodes}: must be at least 1")
    return platform.host.ranks * (nodes or 1) if ranks is None else ranks
