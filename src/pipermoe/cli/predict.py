"""`pipermoe predict`."""

from __future__ import annotations

from pipermoe.cli.options import (
    NO_JOB,
    NO_LIMITS,
    JobOptions,
    LimitOptions,
    ModelName,
    Output,
    PlatformName,
    Switch,
)
from pipermoe.cli.output import note, show


def predict(
    model: ModelName,
    *,
    platform: PlatformName,
    strategy: str,
    job: JobOptions = NO_JOB,
    limits: LimitOptions = NO_LIMITS,
    output: Output | None = None,
    json: Switch = False,
) -> None:
    """Explain a given strategy as `plan` explains its own: step, memory, what binds, why not others, what would help.

    Parameters
    ----------
    strategy
        A strategy or plan file (TOML), or a line such as "pp8 dp32 ep32 mbs1 1f1b z1".
    output
        Write the plan file (TOML), too.
    json
        Print the explanation as JSON.
    """
    from pipermoe.planner.given import explain_given
    from pipermoe.report.plan import render_planning
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.configuration import Configuration
    from pipermoe.specs.documents import require_writable, save
    from pipermoe.specs.platform_file import load_platform
    from pipermoe.specs.strategy_text import read_strategy

    if output is not None:
        require_writable(output)
    machine = load_platform(platform)
    given = Configuration(model=load_model(model), train=job.train(machine), strategy=read_strategy(strategy))
    found = explain_given(given, machine, **limits.limits())
    show(found, lambda console: render_planning(found, console), as_json=json)
    if output is not None:
        note(f"Wrote {save(output, found.plan)}", as_json=json)
