"""`pipermoe demo`: the whole loop on one machine without a GPU, as the very commands that a user would type."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from pipermoe.cli.options import Output, Switch
from pipermoe.specs.documents import write_atomically

MODEL = "tiny-moe"
RANKS = 4
MEMORY_BUDGET = "130MiB"  # a small accelerator: the model with its optimizer does not fit on one rank


def demo(*, output: Output = Path("demo"), json: Switch = False) -> None:
    """Walk the whole loop on this machine without a GPU: measure, plan, train on 4 ranks, compare.

    Parameters
    ----------
    output
        Folder for all files that the loop writes.
    json
        Print the comparison as JSON.
    """
    if code := run_loop(output, as_json=json):
        sys.exit(code)


def loop(folder: Path) -> list[list[str]]:
    """The commands of the loop, in order; each reads what the one before it wrote into `folder`."""
    machine, job, plan, run = (str(folder / name) for name in ("machine.toml", "job.toml", "plan.toml", "run"))
    return [
        ["measure", "--nproc", str(RANKS), "--model", MODEL, "--memory", MEMORY_BUDGET, "-o", machine],
        ["plan", MODEL, "--platform", machine, "--job", job, "-o", plan],
        ["train", "--plan", plan, "-o", run],
        ["compare", "--plan", plan, "--run", run],
    ]


def run_loop(folder: Path, *, as_json: bool) -> int:
    """Run the loop; returns the exit code of the first command that fails, 0 when all succeed.

    With `as_json` stdout carries only the comparison as JSON; everything else goes to stderr.
    """
    console = Console(stderr=as_json)
    template = files("pipermoe.catalogue").joinpath("jobs/demo.toml").read_text(encoding="utf-8")
    write_atomically(folder / "job.toml", template)
    for arguments in loop(folder):
        console.print(f"\n[bold]$ pipermoe {shlex.join(arguments)}[/bold]", soft_wrap=True, highlight=False)
        last = arguments[0] == "compare"
        command = [sys.executable, "-m", "pipermoe", *arguments, *(["--json"] if as_json and last else [])]
        code = subprocess.run(command, stdout=None if last or not as_json else sys.stderr, check=False).returncode
        if code:
            return code
    return 0
