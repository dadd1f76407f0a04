"""`pipermoe describe`."""

from __future__ import annotations

from pipermoe.cli.options import ModelName, Switch
from pipermoe.cli.output import show


def describe(
    model: ModelName,
    *,
    seq_len: int = 4096,
    assume: str | None = None,
    json: Switch = False,
) -> None:
    """Count a model exactly: parameters, active parameters, FLOPs per token, per component and layer.

    Parameters
    ----------
    seq_len
        Sequence length for attention FLOPs and activation sizes.
    assume
        Read a config.json of unknown model_type as this family.
    json
        Print as JSON.
    """
    from pipermoe.report.describe import render_description
    from pipermoe.resources.describe import describe_model
    from pipermoe.specs.catalogue import load_model

    description = describe_model(load_model(model, assume=assume), seq_len=seq_len)
    show(description, lambda console: render_description(description, console), as_json=json)
