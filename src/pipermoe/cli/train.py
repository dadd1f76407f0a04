"""`pipermoe train`."""

from __future__ import annotations

from pathlib import Path

from pipermoe.cli.options import Output, Switch


def train(
    *,
    plan: Path,
    output: Output = Path("run"),
    steps: int | None = None,
    resume: Switch = False,
    weights: Path | None = None,
    json: Switch = False,
) -> None:
    """Train with exactly the strategy of a plan, and measure what the plan predicted.

    Starts the plan's ranks on this machine, or joins those that torchrun or srun started.

    Parameters
    ----------
    plan
        The plan file (see `pipermoe plan`).
    output
        Folder for the log, the measurement and checkpoints.
    steps
        Stop after this many steps; the learning rate goes on as if all of the plan's were to come.
    resume
        Go on from the newest checkpoint in the output folder.
    weights
        Start from the published weights in this folder (config.json and safetensors files of a Hugging Face model), and
        write the trained ones the same way, into the output folder.
    json
        Print the measurement as JSON.
    """
    from pipermoe.runtime.launch import launch
    from pipermoe.specs.documents import load, to_json
    from pipermoe.specs.plan import Plan

    measurement = launch(load(plan, Plan), output, steps=steps, resume=resume, weights=weights, quiet=json)
    if measurement is not None and json:
        print(to_json(measurement))
