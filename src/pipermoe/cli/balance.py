"""`pipermoe balance`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pipermoe.cli.options import Plot, Switch
from pipermoe.cli.output import note, show

if TYPE_CHECKING:
    from pipermoe.layout.policy import Policy
    from pipermoe.layout.replay import Comparison
    from pipermoe.layout.trace import Trace
    from pipermoe.specs.plan import Plan
    from pipermoe.specs.platform import Platform


def balance(
    trace: str,
    *,
    ranks: int | None = None,
    nodes: int = 8,
    slots: int | None = None,
    policy: Annotated[list[str] | None, Parameter(negative="")] = None,
    every: int = 10,
    window: int = 5,
    plan: Path | None = None,
    platform: str | None = None,
    plot: Plot | None = None,
    json: Switch = False,
) -> None:
    """Compare the policies that place experts, on the recorded load of a run.

    Parameters
    ----------
    trace
        Counts of rows per step, layer and expert: the output folder of a run, a file (.npz, .csv or .jsonl,
        docs/balance.md), or a trace that comes with the package: tiny-none, tiny-aux, tiny-bias.
    ranks
        Ranks of the expert-parallel group. Default: those of the plan, or 64.
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
    plan
        Price every policy on this plan (TOML): its step, its moves, its memory.
    platform
        The machine of the plan: a name of the catalogue or a platform file.
    plot
        Draw the imbalance of every step into this file (SVG or PNG).
    json
        Print the comparison as JSON.
    """
    from pipermoe.layout.replay import compare_policies
    from pipermoe.layout.trace import read_trace
    from pipermoe.report.balance import draw_comparison

    read = read_trace(trace)
    priced_on = _plan_and_machine(plan, platform, ranks, read)
    _positive(every=every, window=window)
    ranks = ranks if ranks is not None else (priced_on[0].strategy.expert_parallel if priced_on else 64)
    place = {"ranks": ranks, "nodes": nodes, "slots": _slots(slots, ranks, nodes, experts=read.shape[2])}
    found = compare_policies(read, _chosen(policy, read), **place, every=every, window=window)
    _show_comparison(found, priced_on, as_json=json)
    if plot is not None:
        draw_comparison(found, plot)
        note(f"Wrote {plot}", as_json=json)


def _show_comparison(found: Comparison, priced_on: tuple[Plan, Platform] | None, *, as_json: bool) -> None:
    from pipermoe.report.balance import render_comparison, render_prices
    from pipermoe.resources.relayout import price_policies

    if priced_on is None:
        show(found, lambda console: render_comparison(found, console), as_json=as_json)
    else:
        priced = price_policies(found, *priced_on)
        show(priced, lambda console: render_prices(priced, console), as_json=as_json)


def _plan_and_machine(
    path: Path | None, platform: str | None, ranks: int | None, trace: Trace
) -> tuple[Plan, Platform] | None:
    """Where policies are priced, if they are."""
    from pipermoe.specs.documents import load
    from pipermoe.specs.errors import UserError
    from pipermoe.specs.plan import Plan
    from pipermoe.specs.platform_file import load_platform

    if path is None and platform is None:
        return None
    if path is None or platform is None:
        raise UserError("--plan and --platform go together: policies are priced for a plan on its machine")
    plan = load(path, Plan)
    shared, experts = plan.strategy.expert_parallel, plan.model.moe.num_experts
    if ranks not in (None, shared):
        raise UserError(f"--ranks = {ranks}: {path} divides experts over {shared} ranks; leave --ranks out")
    if experts != trace.shape[2]:
        raise UserError(f"{trace.name}: a load of {trace.shape[2]} experts; {plan.model.name} of {path} has {experts}")
    return plan, load_platform(platform)


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
