"""`pipermoe balance`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipermoe.cli.options import Switch
from pipermoe.cli.output import note, show

if TYPE_CHECKING:
    from pipermoe.layout.policy import Policy
    from pipermoe.layout.trace import Trace


def balance(
    trace: str,
    *,
    ranks: int = 64,
    nodes: int = 8,
    slots: int | None = None,
    policy: list[str] | None = None,
    every: int = 10,
    window: int = 5,
    plot: Path | None = None,
    json: Switch = False,
) -> None:
    """Compare the policies that place experts, on the recorded load of a run.

    Parameters
    ----------
    trace
        Counts of rows per step, layer and expert (.npz or .csv, docs/balance.md), or a trace that comes with the
        package: tiny-none, tiny-aux, tiny-bias.
    ranks
        Ranks of the expert-parallel group.
    nodes
        Nodes that they are on.
    slots
        Copies of experts that a rank holds in each layer. Default: one more than the experts need.
    policy
        Only this policy; may be repeated. Default: all but two-stage, which takes minutes and scipy.
    every
        Steps between two plans.
    window
        Steps whose mean load a plan is made for.
    plot
        Draw the imbalance of every step into this file (SVG or PNG).
    json
        Print the comparison as JSON.
    """
    from pipermoe.layout.replay import compare_policies
    from pipermoe.layout.trace import read_trace
    from pipermoe.report.balance import draw_comparison, render_comparison

    read = read_trace(trace)
    fitting = _slots(slots, ranks, nodes, experts=read.shape[2])
    _positive(every=every, window=window)
    found = compare_policies(
        read, _chosen(policy, read), ranks=ranks, nodes=nodes, slots=fitting, every=every, window=window
    )
    if plot is not None:
        draw_comparison(found, plot)
    show(found, lambda console: render_comparison(found, console), as_json=json)
    if plot is not None:
        note(f"Wrote {plot}", as_json=json)


def _slots(slots: int | None, ranks: int, nodes: int, *, experts: int) -> int:
    """The slots of a rank, once ranks, nodes and slots fit together and hold every expert."""
    from pipermoe.specs.errors import UserError, nearest_divisors

    _positive(ranks=ranks, nodes=nodes)
    if ranks % nodes:
        ways = ", ".join(map(str, nearest_divisors(nodes, ranks)))
        raise UserError(f"--nodes = {nodes}: must divide --ranks = {ranks}; nearest: {ways}")
    fewest = -(-experts // ranks)
    if slots is None:
        return fewest + 1
    if slots < fewest:
        raise UserError(f"--slots = {slots}: {experts} experts on {ranks} ranks need at least {fewest} slots a rank")
    return slots


def _positive(**values: int) -> None:
    from pipermoe.specs.errors import UserError

    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name} = {value}: must be at least 1")


def _chosen(names: list[str] | None, trace: Trace) -> dict[str, Policy]:
    from pipermoe.layout.policies import OFFLINE, policies_for
    from pipermoe.specs.errors import UserError

    policies = policies_for(trace)
    for name in names or ():
        if name not in policies:
            needs = "; co-activation needs a trace with routes" if name == "co-activation" else ""
            raise UserError(f"--policy = {name!r}: must be one of {', '.join(policies)}{needs}")
    return {name: policies[name] for name in names or (name for name in policies if name not in OFFLINE)}
