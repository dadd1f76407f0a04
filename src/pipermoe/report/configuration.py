"""A Configuration for a terminal: what was read from the arguments of another system, and what it costs."""

from __future__ import annotations

from rich.console import Console

from pipermoe.specs.configuration import Configuration
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_bytes, format_number


def render_configuration(read: Configuration, plan: Plan | None, console: Console) -> None:
    """Print `read`, the remarks about it, and the prediction of `plan` if there is one."""
    model, train = read.model, read.train
    lines = {
        "Model": f"{model.num_layers} layers, hidden {model.hidden_size:,}, {model.moe.num_experts} experts "
        f"top {model.moe.top_k}",
        "Job": f"seq {train.seq_len}, {train.global_batch_size} sequences a step, {train.precision}",
        "Strategy": f"{strategy_text(read.strategy)} on {format_number(read.strategy.world_size, 'rank')}",
    }
    if plan is not None:
        peak = max(rank.peak_bytes for rank in plan.prediction.ranks)
        lines["Predicted"] = (
            f"{plan.prediction.step_seconds:.4g} s a step, {format_bytes(peak)} of "
            f"{format_bytes(plan.memory_budget_bytes)} on {plan.platform}"
        )
    for name, line in lines.items():
        console.print(f"[bold]{name:<10}[/bold]{line}", highlight=False)
    for remark in read.remarks:
        console.print(f"{'Note':<10}{remark}", highlight=False, markup=False)
