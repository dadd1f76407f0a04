"""Any exported job, and our own training, as a Slurm batch script: one launch.sh per node, started by srun."""

from __future__ import annotations

from pipermoe.export.shell import Cluster, header, launch_script, title
from pipermoe.specs.documents import to_toml
from pipermoe.specs.plan import Plan
from pipermoe.specs.units import format_number

TESTED_WITH = "Slurm 22.05"


def own_files(plan: Plan, cluster: Cluster) -> dict[str, str]:
    """The files that train `plan` with this project's runtime."""
    what = title(plan)
    return {
        "plan.toml": to_toml(plan),
        "launch.sh": launch_script(
            what,
            "torch 2.13.0",
            cluster,
            "-m pipermoe train --plan plan.toml --output run",
            environment={"OMP_NUM_THREADS": '"${OMP_NUM_THREADS:-1}"'},
        ),
    }


def batch_script(
    what: str, cluster: Cluster, *, gpus: bool, time: str, partition: str | None = None, account: str | None = None
) -> str:
    """A script for sbatch, submitted from its folder, that runs launch.sh on every node.

    Every node's torchrun meets the others at the first node; the port follows from the job, so that jobs on shared
    nodes do not meet each other. A rank that fails ends the job.
    """
    directives = {
        "job-name": "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in what)[:48],
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.ranks_per_node if gpus else None,
        "time": time,
        "partition": partition,
        "account": account,
        "output": "%x.%j.log",
    }
    lines = "".join(f"#SBATCH --{key}={value}\n" for key, value in directives.items() if value is not None)
    return (
        "#!/usr/bin/env bash\n"
        + lines
        + header(
            f"{what} on {format_number(cluster.nodes, 'node')}; submit it from its folder: sbatch job.sbatch",
            TESTED_WITH,
        )
        + "set -euo pipefail\n"
        + 'cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"\n'
        + ': "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"\n'
        + ': "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 20000))}"\n'
        + "export MASTER_ADDR MASTER_PORT\n"
        + "# shellcheck disable=SC2016  # SLURM_NODEID is each node's own\n"
        + "srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec ./launch.sh'\n"
    )
