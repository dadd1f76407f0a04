"""Shell scripts around a program: started by hand on every node, or by Slurm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipermoe import __version__
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_number


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a job of `world_size` ranks runs. UserError material: `world_size` must fill whole nodes."""

    world_size: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        return self.world_size // self.ranks_per_node


def title(plan: Configuration | Plan) -> str:
    """What the job is, in a line."""
    return f"{plan.model.name} on {format_number(plan.strategy.world_size, 'rank')}: {strategy_text(plan.strategy)}"


def header(what: str, tested_with: str) -> str:
    """The first lines of every file."""
    return f"# {what}\n# Written by pipermoe {__version__}; tested with {tested_with}.\n"


def launch_script(
    what: str,
    tested_with: str,
    cluster: Cluster,
    program: str,
    *,
    environment: Mapping[str, str],
    needs: Sequence[tuple[str, str]] = (),
    before: str = "",
) -> str:
    """A script that starts a node's ranks with torchrun: run it on every node, NODE_RANK telling which one it is.

    `program` is what torchrun starts, with "$@" behind it; `needs` are variables that the user must set, and what for.
    """
    checks = "".join(f': "${{{name}:?{purpose}}}"\n' for name, purpose in needs)
    exports = "".join(f"export {name}={value}\n" for name, value in environment.items())
    several = "# On every node: NODE_RANK=0.. MASTER_ADDR=first-node ./launch.sh\n" if cluster.nodes > 1 else ""
    return (
        "#!/usr/bin/env bash\n"
        + header(what, tested_with)
        + several
        + "# DRY_RUN=1 prints the command. Further arguments are passed on.\n"
        + "set -euo pipefail\n"
        + 'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
        + checks
        + exports
        + before
        + f"command=(torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.ranks_per_node}\n"
        + '  --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}"\n'
        + '  --master-port "${MASTER_PORT:-29500}"\n'
        + f'  {program} "$@")\n'
        + 'if [[ -n "${DRY_RUN:-}" ]]; then printf \'%q \' "${command[@]}"; echo; exit; fi\n'
        + 'exec "${command[@]}"\n'
    )
