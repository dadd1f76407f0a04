"""The world of ranks that somebody else has started, read from the environment of this process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipermoe.specs.errors import UserError


@dataclass(frozen=True, slots=True)
class World:
    """One rank's place among all, and where they meet (`init_method` of torch.distributed)."""

    starter: str
    rank: int
    size: int
    local_rank: int
    init_method: str


def existing_world(environment: Mapping[str, str]) -> World | None:
    """The world of torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS); None if this process is alone."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if rank >= size:
            raise UserError(f"RANK = {rank}: must be below WORLD_SIZE = {size}")
        if _inside_srun(environment) and "TORCHELASTIC_RUN_ID" not in environment:
            _must_agree(environment, rank, size)
        return World("torchrun", rank, size, _number(environment, "LOCAL_RANK", rank), _meeting_point(environment))
    if _inside_srun(environment):
        rank, size = _number(environment, "SLURM_PROCID"), _tasks(environment)
        if rank >= size:
            raise UserError(f"SLURM_PROCID = {rank}: must be below the {size} tasks of the step")
        return World("srun", rank, size, _number(environment, "SLURM_LOCALID", rank), _slurm_meeting_point(environment))
    return None


def _tasks(environment: Mapping[str, str]) -> int:
    """Those of this job step; SLURM_NTASKS may be those of the whole job."""
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS"))


def _must_agree(environment: Mapping[str, str], rank: int, size: int) -> None:
    """A task of srun is one rank unless torchrun starts several: a RANK left over from elsewhere would hang the job."""
    task, tasks = _number(environment, "SLURM_PROCID"), _tasks(environment)
    if (rank, size) != (task, tasks):
        raise UserError(
            f"RANK = {rank} of WORLD_SIZE = {size}, but SLURM_PROCID = {task} of {tasks} tasks: unset RANK and "
            "WORLD_SIZE, or start torchrun inside srun"
        )


def _inside_srun(environment: Mapping[str, str]) -> bool:
    """A task of srun: a batch script has a SLURM_PROCID too, but outside of a job step there is nobody to join."""
    if "SLURM_PROCID" not in environment or "SLURM_NTASKS" not in environment:
        return False
    return "SLURM_JOB_ID" not in environment or "SLURM_STEP_ID" in environment


def _meeting_point(environment: Mapping[str, str]) -> str:
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(key)]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set but {' and '.join(missing)} not; start with torchrun, or unset them"
        )
    return f"tcp://{environment['MASTER_ADDR']}:{_number(environment, 'MASTER_PORT')}"


def _slurm_meeting_point(environment: Mapping[str, str]) -> str:
    """The first host of the step, and a port that differs from job to job."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    port = _number(environment, "MASTER_PORT", 20000 + _number(environment, "SLURM_JOB_ID", 0) % 20000)
    return f"tcp://{host}:{port}"


def first_host(nodes: str) -> str:
    """`gpu[03-07,9],login1` -> `gpu03`: the first name of Slurm's compressed host list."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r}: is not a list of hosts; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _number(environment: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environment.get(key)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UserError(f"{key} = {text!r}: must be a whole number, set by torchrun or srun")
    return int(text)
