"""`pipermoe predict`."""

from __future__ import annotations

from pathlib import Path

from pipermoe.cli.options import Output, Switch, memory_bytes, training_job
from pipermoe.cli.output import note, show


def predict(
    model: str,
    *,
    platform: str,
    strategy: str,
    job: Path | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    precision: str | None = None,
    memory: str | None = None,
    imbalance: float = 1.0,
    output: Output | None = None,
    json: Switch = False,
) -> None:
    """Explain a given strategy as `plan` explains its own: step, memory, what binds, why not others, what would help.

    Parameters
    ----------
    model
        A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.
    platform
        A machine of the catalogue (docs/platforms.md) or a platform file (pipermoe measure).
    strategy
        A strategy or plan file (TOML), or a line such as "pp8 dp32 ep32 mbs1 1f1b z1".
    job
        The training job (TOML): batch, sequence, optimizer, data. Options below override it.
    seq_len
        Tokens in a sequence.
    global_batch
        Sequences in a step.
    precision
        fp32, bf16, fp16 or fp8. Default without a job: bf16 where the device is faster in it than in fp32.
    memory
        Memory budget of one rank, for example 80GiB. Default: the platform's.
    imbalance
        Rows of the busiest rank over the mean; 1 is balanced routing.
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
    task = training_job(job, seq_len, global_batch, precision, {"precision": machine.usual_precision})
    given = Configuration(model=load_model(model), train=task, strategy=read_strategy(strategy))
    found = explain_given(given, machine, memory_budget_bytes=memory_bytes(memory), imbalance=imbalance)
    show(found, lambda console: render_planning(found, console), as_json=json)
    if output is not None:
        note(f"Wrote {save(output, found.plan)}", as_json=json)
