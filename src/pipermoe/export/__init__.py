"""Plans as jobs of other systems: one file per target, each with its limits and its files.

`export_plan` is the door; export/reading.py is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipermoe.export import megatron, slurm
from pipermoe.export.deepspeed import config as deepspeed_config
from pipermoe.export.deepspeed import limits as deepspeed_limits
from pipermoe.export.deepspeed import names as deepspeed_names
from pipermoe.export.limits import Limit, require_expressible
from pipermoe.export.shell import Cluster
from pipermoe.export.torchtitan import limits as titan_limits
from pipermoe.export.torchtitan import module as titan_module
from pipermoe.export.torchtitan import names as titan_names
from pipermoe.specs.base import Frozen
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import LEGAL, RULES, violations
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform


@dataclass(frozen=True, slots=True)
class Target:
    """A system that runs plans: its name and version, what it cannot express, and the files of a job."""

    title: str
    limits: Callable[[Configuration], Sequence[Limit]]
    files: Callable[[Configuration, Cluster], dict[str, str]]


TARGETS: dict[str, Target] = {
    "megatron": Target(megatron.TARGET, megatron.limits, megatron.files),
    "torchtitan": Target(titan_names.TARGET, lambda plan: titan_limits.LIMITS, titan_module.files),
    "deepspeed": Target(deepspeed_names.TARGET, lambda plan: deepspeed_limits.LIMITS, deepspeed_config.files),
}

OWN = "pipermoe"

# What no other system has.
EVERYWHERE = Limit(
    "strategy.exchange",
    lambda plan: plan.strategy.exchange == "library",
    "leaves all-to-alls to the communication library",
    lambda plan: {"exchange": "library"},
)


class Job(Frozen):
    """The files of a job by name, and the version that such files were tested with."""

    tested_with: str
    files: dict[str, str]


def export_plan(
    plan: Plan, target: str, ranks_per_node: int, *, where: str = "", platform: Platform | None = None
) -> Job:
    """The job of `target` ("pipermoe": our own training) that runs `plan`. UserError where none does, with the nearest.

    `where` names the plan in errors; `platform` prices the nearest plan.
    """
    cluster = cluster_of(plan, ranks_per_node)
    wanted = Configuration(model=plan.model, train=plan.train, strategy=plan.strategy)
    rules = RULES if target == OWN else LEGAL
    if broken := violations(plan.strategy, plan.model, plan.train, cluster.world_size, rules):
        raise UserError(f"{where}: {broken[0]}")
    if target == OWN:
        return Job(tested_with=slurm.TESTED_WITH, files=slurm.own_files(plan, cluster))
    system = TARGETS[target]
    limits = (EVERYWHERE, *system.limits(wanted))
    require_expressible(system.title, limits, wanted, where=where, platform=platform)
    return Job(tested_with=system.title, files=system.files(wanted, cluster))


def cluster_of(plan: Plan, ranks_per_node: int) -> Cluster:
    """The nodes of the plan's ranks. UserError where they are not filled."""
    world_size = plan.strategy.world_size
    if ranks_per_node < 1 or world_size % ranks_per_node:
        rule = f"must divide the plan's {world_size} ranks"
        raise UserError(describe_value("", "--ranks-per-node", ranks_per_node, rule))
    return Cluster(world_size, ranks_per_node)
