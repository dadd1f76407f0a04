"""A Description as tables for a terminal: what the model is made of, what a token costs, how large it is."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipermoe.resources.describe import Component, Description, LayerKind
from pipermoe.specs.model import GroupedQueryAttention, LatentAttention, ModelSpec
from pipermoe.specs.units import format_bytes, format_count

COMPONENT_NAMES: dict[Component, str] = {
    "embedding": "embedding",
    "attention": "attention",
    "router": "router",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "dense_mlp": "dense layers' MLP",
    "norms": "norms",
    "head": "head",
}


def render_description(description: Description, console: Console) -> None:
    """Print `description`: totals, components, kinds of layers, FLOPs and bytes per token."""
    console.print(f"[bold]{description.name}[/bold]  {description.source}", highlight=False)
    for line in _architecture(description.model):
        console.print(f"  {line}", highlight=False)
    console.print(f"  {_totals(description)}\n", highlight=False)
    console.print(_component_table(description))
    console.print()
    console.print(_layer_table(description))
    console.print()
    console.print(_flops_table(description))
    console.print()
    console.print(_bytes_table(description))


def _architecture(model: ModelSpec) -> list[str]:
    moe = model.moe
    shared = f", shared {moe.shared_width:,}" if moe.shared_width else ""
    matrices = "" if moe.expert_matrices == 3 else " (2 matrices)"
    return [
        f"{model.num_layers} layers, hidden {model.hidden_size:,}, vocabulary {model.vocab_size:,}; "
        f"{_attention(model.attention)}",
        f"{moe.num_experts} experts of width {moe.expert_width:,}{matrices}, top {moe.top_k}{shared}, "
        f"in {len(model.moe_layers)} layers",
    ]


def _attention(attention: GroupedQueryAttention | LatentAttention) -> str:
    if isinstance(attention, GroupedQueryAttention):
        return f"{attention.num_heads} heads of {attention.head_dim}, {attention.num_kv_heads} key-value"
    sparse = f", sparse {attention.indexer.top_k:,}" if attention.indexer else ""
    return f"{attention.num_heads} latent heads of {attention.query_key_dim}, rank {attention.kv_lora_rank}{sparse}"


def _totals(description: Description) -> str:
    return (
        f"[bold]{format_parameters(description.total_parameters)}[/bold] parameters, "
        f"[bold]{format_parameters(description.active_parameters)}[/bold] active per token "
        f"({format_parameters(description.active_parameters_without_embedding)} without the embedding), "
        f"{format_parameters(description.expert_parameters)} per expert"
    )


def format_parameters(count: int) -> str:
    """`671026404352 -> "671.03B"`, as models are named: thousands k, millions M, billions B, trillions T."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.2f}{suffix}"
    return str(count)


def _flops(count: float) -> str:
    return format_count(count) if count else ""


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _component_table(description: Description) -> Table:
    table = _table(
        f"Components; FLOPs forward per token at {description.seq_len:,} tokens",
        "component",
        "parameters",
        "share",
        "active",
        "FLOPs causal",
        "FLOPs full",
    )
    for part in description.components:
        if part.parameters or part.forward_flops_full:
            table.add_row(
                COMPONENT_NAMES[part.component],
                f"{part.parameters:,}",
                f"{part.parameters / description.total_parameters:.1%}",
                format_parameters(part.active_parameters),
                _flops(part.forward_flops_causal),
                _flops(part.forward_flops_full),
            )
    flops = description.flops_per_token
    table.add_row(
        "[bold]total[/bold]",
        f"[bold]{description.total_parameters:,}[/bold]",
        "",
        f"[bold]{format_parameters(description.active_parameters)}[/bold]",
        f"[bold]{format_count(flops.forward_causal)}[/bold]",
        f"[bold]{format_count(flops.forward_full)}[/bold]",
    )
    mtp = description.multi_token_prediction
    if mtp:
        table.add_row(
            f"[dim]+ {mtp.modules} MTP module{'s' if mtp.modules > 1 else ''}, apart[/dim]",
            f"{mtp.parameters:,}",
            "",
            "",
            format_count(mtp.forward_flops_causal),
            format_count(mtp.forward_flops_full),
        )
    return table


def _layer_table(description: Description) -> Table:
    table = _table(
        "One layer, per token: FLOPs forward, bytes saved",
        "layers",
        "parameters",
        "active",
        "causal",
        "full",
        "saved",
    )
    for kind in description.layers:
        saved = format_bytes(kind.saved_bytes_per_token)
        table.add_row(
            _layer_name(kind),
            f"{kind.parameters:,}",
            format_parameters(kind.active_parameters),
            format_count(kind.forward_flops_causal),
            format_count(kind.forward_flops_full),
            saved,
        )
    return table


def _layer_name(kind: LayerKind) -> str:
    attention = "" if kind.attention == "full" else f", {kind.attention}"
    return f"{len(kind.layers)} x {kind.feed_forward}{attention}"


def _flops_table(description: Description) -> Table:
    flops = description.flops_per_token
    table = _table(f"FLOPs per token at {description.seq_len:,} tokens", "convention", "forward", "forward + backward")
    rows = (
        ("matrix products, causal attention", flops.forward_causal, flops.forward_backward_causal),
        ("matrix products, full attention", flops.forward_full, flops.forward_backward_full),
    )
    for name, forward, both in rows:
        table.add_row(name, f"{forward:,.0f}", f"{both:,.0f}")
    table.add_row("6N + full attention (torchtitan)", "", f"{flops.six_n:,.0f}")
    return table


def _bytes_table(description: Description) -> Table:
    size = description.token_bytes
    table = _table("Bytes per token, 16 bit", "what", "size")
    table.add_row("hidden state, between stages", format_bytes(size.hidden_state))
    table.add_row("key-value cache, all layers", format_bytes(size.key_value_cache))
    table.add_row("all-to-all dispatch, one layer", format_bytes(size.dispatched))
    table.add_row("inside the experts, one layer", format_bytes(size.expert_inner))
    table.add_row("logits", format_bytes(size.logits))
    return table
