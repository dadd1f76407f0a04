"""Plans as jobs of other systems: one file per target. What each can execute is `specs.runtimes`.

`export_plan` is the door; export/reading.py is the way back.
"""

from __future__ import annotations

from collections.abc import Callable

from pipermoe.export import megatron, slurm
from pipermoe.export.deepspeed import config as deepspeed_config
from pipermoe.export.refusal import require_executable
from pipermoe.export.shell import Cluster
from pipermoe.export.torchtitan import module as titan_module
from pipermoe.specs.base import Frozen
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import LEGAL, violations
from pipermoe.specs.plan import Plan, RuntimeName
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes import RUNTIMES

OWN: RuntimeName = "pipermoe"
FILES: dict[RuntimeName, Callable[[Configuration, Cluster], dict[str, str]]] = {
    "megatron": megatron.files,
    "torchtitan": titan_module.files,
    "deepspeed": deepspeed_config.files,
}


class Job(Frozen):
    """The files of a job by name, and the version that such files were tested with."""

    tested_with: str
    files: dict[str, str]


def export_plan(
    plan: Plan, target: RuntimeName, ranks_per_node: int, *, where: str = "", platform: Platform | None = None
) -> Job:
    """The job of `target` ("pipermoe": our own training) that runs `plan`. UserError where none does, with the nearest.

    `where` names the plan in errors; `platform` prices the nearest plan.
    """
    cluster = cluster_of(plan, ranks_per_node)
    wanted = Configuration(model=plan.model, train=plan.train, strategy=plan.strategy)
    if broken := violations(plan.strategy, plan.model, plan.train, cluster.world_size, LEGAL):
        raise UserError(f"{where}: {broken[0]}")
    runtime = RUNTIMES[target]
    require_executable(runtime, wanted, where=where, platform=platform)
    if target == OWN:
        return Job(tested_with=slurm.TESTED_WITH, files=slurm.own_files(plan, cluster))
    return Job(tested_with=runtime.title, files=FILES[target](wanted, cluster))


def cluster_of(plan: Plan, ranks_per_node: int) -> Cluster:
    """The nodes of the plan's ranks. UserError where they are not filled."""
    world_size = plan.strategy.world_size
    if ranks_per_node < 1 or world_size % ranks_per_node:
        rule = f"must divide the plan's {world_size} ranks"
        raise UserError(describe_value("", "--ranks-per-node", ranks_per_node, rule))
    return Cluster(world_size, ranks_per_node)
