"""A MegatronFootprint for a terminal: one row per pipeline rank, then the terms of the largest."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipermoe.resources.megatron.footprint import MegatronFootprint
from pipermoe.specs.units import format_bytes


def render_megatron_memory(found: MegatronFootprint, console: Console) -> None:
    """Print `found`, and which arguments it does not describe."""
    table = Table("pipeline rank", box=None)
    for name in ("between steps", "activations", "on top", "peak"):
        table.add_column(name, justify="right")
    for rank in found.ranks:
        sizes = (rank.static_total, rank.activations, rank.transient, rank.peak)
        table.add_row(str(rank.pipeline_rank), *map(format_bytes, sizes))
    console.print(table)
    largest = found.largest
    console.print(f"\nRank {largest.pipeline_rank} between steps:", highlight=False)
    terms = Table(box=None, show_header=False)
    for name, size in largest.static.items():
        if size:
            terms.add_row(name.replace("_", " "), format_bytes(size))
    console.print(terms)
    for argument in found.undescribed:
        console.print(f"Not in these numbers: {argument}", highlight=False, markup=False)
