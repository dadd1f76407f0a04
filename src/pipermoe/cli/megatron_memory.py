"""`pipermoe megatron-memory`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from pipermoe.cli.options import Switch
from pipermoe.cli.output import show
from pipermoe.resources.megatron.release import NEWEST, Release

Gpu = Literal["ampere", "hopper", "blackwell"]
COMPUTE_CAPABILITY: dict[Gpu, int] = {"ampere": 8, "hopper": 9, "blackwell": 10}


def megatron_memory(
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
    world_size: Annotated[int | None, Parameter(name=["--world-size", "--ranks", "--gpus"])] = None,
    gpu: Gpu = "hopper",
    imbalance: float = 1.0,
    release: Release = NEWEST,
    json: Switch = False,
) -> None:
    """Predict what every pipeline rank of a Megatron-LM job holds, from its arguments.

    Parameters
    ----------
    arguments
        The arguments of pretrain_gpt.py behind --, or one file that holds them; --vocab-size must be among them.
    world_size
        Ranks of the job; Megatron's arguments do not say it.
    gpu
        The generation of the GPU: it decides workspaces and the attention core.
    imbalance
        Rows that the experts of a rank receive, relative to balanced routing.
    release
        The release of Megatron-Core: some keep tensors that others free.
    json
        Print every term as JSON.
    """
    from dataclasses import replace

    from pipermoe.export.reading import read_megatron_arguments
    from pipermoe.report.megatron_memory import render_megatron_memory
    from pipermoe.resources.megatron.footprint import footprint
    from pipermoe.resources.megatron.job import Machine
    from pipermoe.resources.megatron.reader import read_job, undescribed
    from pipermoe.specs.errors import UserError

    if imbalance < 1:
        raise UserError(f"--imbalance = {imbalance}: must be at least 1, which is balanced routing")
    given, ranks = read_megatron_arguments(arguments, world_size)
    job = replace(read_job(given, ranks, COMPUTE_CAPABILITY[gpu], release), routing_imbalance=imbalance)
    found = footprint(job, Machine.of(COMPUTE_CAPABILITY[gpu]), tuple(undescribed(given)))
    show(found, lambda console: render_megatron_memory(found, console), as_json=json)
