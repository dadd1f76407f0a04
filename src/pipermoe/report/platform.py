"""A Platform as tables for a terminal: what the device reaches, what the network costs, how far to trust it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table

from pipermoe.measure.drift import TOLERATED, Drifts
from pipermoe.specs.device import RateCurve
from pipermoe.specs.network import COLLECTIVES, Collective, Level, LinkCost
from pipermoe.specs.platform import Platform
from pipermoe.specs.precision import Precision
from pipermoe.specs.units import format_bytes, format_count, format_seconds

UNSTEADY = 0.2  # `Host.noise` above which predictions within 10 % are not to be expected


def render_platform(platform: Platform, console: Console) -> None:
    """Print `platform`: device rates, network costs, and what they rest on."""
    device, host = platform.device, platform.host
    console.print(f"[bold]{platform.name}[/bold]  {platform.source}", highlight=False)
    peaks = ", ".join(f"{format_count(rate, 'FLOP/s')} {name}" for name, rate in device.peak_flops_per_s.items())
    console.print(f"  peak {peaks}; {format_bytes(device.memory_bytes)} a rank; {_sharing(platform)}", highlight=False)
    console.print(_device_table(platform))
    for level in platform.levels:
        if level.link is None:
            console.print(_level_table(platform, level))
    if any(level.link for level in platform.levels):
        console.print(_link_table(platform))
    if host.noise is not None and host.noise > UNSTEADY:
        console.print(
            f"[yellow]The machine was unsteady: a fixed kernel varied by {host.noise:.0%} (10th to 90th percentile). "
            "Measure again on a quiet machine before trusting predictions to 10 %.[/yellow]",
            highlight=False,
        )


def render_drifts(found: Drifts, console: Console) -> None:
    """Print what a platform file says that the machine no longer does."""
    large = [drift for drift in found.changes if drift.is_large]
    for drift in large:
        console.print(f"[yellow]{drift.key}: {drift.ratio:.2f} of the rate in the file[/yellow]", highlight=False)
    advice = "; measure again" if large else ""
    console.print(f"{len(large)} of {len(found.changes)} rates changed by more than {TOLERATED:.0%}{advice}")
    if found.noise is not None and found.noise > UNSTEADY:
        console.print(f"The machine was unsteady now: a fixed kernel varied by {found.noise:.0%}.", highlight=False)


def _sharing(platform: Platform) -> str:
    host = platform.host
    noise = "" if host.noise is None else f"; host noise {host.noise:.0%}"
    meetings = "".join(f"; a meeting of {n} {format_seconds(each)}" for n, each in host.meeting_seconds.items())
    return f"{host.ranks} ranks a host compute like {host.compute_slots:.3g} undisturbed ones{meetings}{noise}"


def _device_table(platform: Platform) -> Table:
    """Every curve as its smallest, a middle and its largest size: rate @size."""
    table = Table(title="Device: rate of one rank @size", title_justify="left", box=None, pad_edge=False)
    table.add_column("work")
    for name in ("small", "middle", "large"):
        table.add_column(name, justify="right")
    device = platform.device
    flops: list[tuple[str, Iterable[tuple[Precision, RateCurve]]]] = [
        ("matrix product, by FLOPs", device.gemm.items()),
        ("attention forward, by sequence", device.attention.items()),
        ("attention backward", device.attention_backward.items()),
    ]
    for precision, grouped in device.grouped_gemm.items():
        for curve in grouped:
            flops.append((f"experts of width {curve.width}, by rows each", [(precision, curve)]))
    table.add_row("[dim]FLOP/s[/dim]")
    for name, curves in flops:
        for precision, curve in curves:
            table.add_row(f"{name} [dim]{precision}[/dim]", *_cells(curve))
    table.add_row("[dim]bytes/s[/dim]")
    table.add_row("element-wise, by bytes", *_cells(device.memory_bound))
    for precision, passes in device.passes.items():
        table.add_row(f"[dim]elements/s, {precision}[/dim]")
        for kind, rate in passes.items():
            table.add_row(f"{kind} forward" if rate.backward else kind, *_cells(rate.forward))
            if rate.backward:
                table.add_row(f"{kind} backward", *_cells(rate.backward))
    return table


def _cells(curve: RateCurve) -> list[str]:
    last = len(curve.size) - 1
    shown = sorted({0, last // 2, last})
    return [f"{format_count(curve.rate[i])} [dim]@{format_count(curve.size[i])}[/dim]" for i in shown]


def _level_table(platform: Platform, level: Level) -> Table:
    table = Table(
        title=f"Network: level {level.name}, {level.ranks} ranks", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("call")
    for name in ("ranks", "latency", "bandwidth", "fit error"):
        table.add_column(name, justify="right")
    sizes: list[tuple[int, str, Callable[[Collective], LinkCost | None]]] = [
        (size, f"group_cost.{size}", costs.get) for size, costs in sorted(level.group_cost.items())
    ]
    sizes.append((level.ranks, "cost", level.cost.get))
    for collective in COLLECTIVES:
        for size, where, cost_of in sizes:
            cost = cost_of(collective)
            if cost is None:
                continue
            evidence = platform.evidence_for(f"levels.{level.name}.{where}.{collective}")
            error = f"{evidence.residual:.0%}" if evidence and evidence.residual is not None else "-"
            ranks = "2" if collective == "send" else str(size)
            bandwidth = f"{format_count(cost.bandwidth_bytes_per_s, 'B/s')}"
            table.add_row(collective, ranks, format_seconds(cost.latency_seconds), bandwidth, error)
    return table


def _link_table(platform: Platform) -> Table:
    """The described levels: what one rank can send through each while all of them do."""
    table = Table(title="Network, from its description", title_justify="left", box=None, pad_edge=False)
    table.add_column("level")
    for name in ("ranks", "one rank sends", "latency", "topology", "library"):
        table.add_column(name, justify="right" if name in ("ranks", "one rank sends", "latency") else "left")
    for index, level in enumerate(platform.levels):
        if level.link is not None:
            port = format_count(platform.port_bytes_per_s(index), "B/s")
            latency, kind = format_seconds(level.link.latency_seconds), level.link.topology.replace("_", " ")
            table.add_row(level.name, f"{level.ranks:,}", port, latency, kind, level.link.library or "-")
    return table
