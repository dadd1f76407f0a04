"""From the points that the ranks measured to a Platform: curves, fitted costs, and the evidence for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipermoe.measure.collectives import Grouping, groupings
from pipermoe.measure.fits import fit_link_cost, fit_rate_curve
from pipermoe.measure.record import Record
from pipermoe.measure.samples import Point, merge_ranks
from pipermoe.specs.device import PASSES, Device, GroupedCurve, Pass, PassRate, RateCurve
from pipermoe.specs.errors import MachineError
from pipermoe.specs.network import COLLECTIVES, Collective, Level, LinkCost
from pipermoe.specs.platform import Evidence, Host, Platform
from pipermoe.specs.units import format_number


class Assembly:
    """The merged points of all ranks and the evidence that gathers while a Platform is made from them.

    What the ranks did not measure is given: the memory of one rank and where it comes from, the bytes that the
    framework keeps, and the date.
    """

    def __init__(self, record: Record, memory_bytes: int, memory_source: str, reserved_bytes: int, date: str) -> None:
        self.settings, self.date = record.settings, date
        self.memory_bytes, self.memory_source, self.reserved_bytes = memory_bytes, memory_source, reserved_bytes
        self.per_rank = record.points_of_ranks()
        keys = dict.fromkeys(key for points in self.per_rank for key in points)
        self.points = {key: merge_ranks([points[key] for points in self.per_rank if key in points]) for key in keys}
        self.evidence: dict[str, Evidence] = {}

    def platform(self) -> Platform:
        """The Platform. Raises `MachineError` when the measurements do not make one."""
        settings = self.settings
        device, levels = self._device(), self._levels()
        return Platform(
            name=f"{settings.device}, {settings.ranks} ranks",
            source=f"measured with {settings.ranks} ranks on {self.date}",
            device=device,
            host=self._host(levels[0]),
            levels=levels,
            reserved_bytes=self.reserved_bytes,
            software=dict(settings.software),
            evidence=self.evidence,
        )

    def _device(self) -> Device:
        precision = self.settings.precision
        gemm = self._curve("device.gemm", "gemm", "three products of a dense layer")
        grouped = self._curve("device.grouped_gemm", "grouped_gemm", "three products of the experts, equal rows")
        self._judge_skew(grouped)
        self._record("device.memory_bytes", "assumed", self.memory_source)
        best = max(point.rate for key in ("gemm", "grouped_gemm") for point in self.points[key])
        self._record("device.peak_flops_per_s", "measured", "the fastest matrix product seen")
        tiny = self.points["kernel_seconds"]
        self._record(
            "device.kernel_seconds", "measured", f"a chain of tiny differentiable operations; {_quality(tiny)}"
        )
        core = "causal scaled_dot_product_attention"
        self._record("device.pads_values", "datasheet", "the runtime pads values for torch's fused attention")
        return Device(
            name=self.settings.device,
            memory_bytes=self.memory_bytes,
            peak_flops_per_s={precision: _round(best)},
            gemm={precision: gemm},
            grouped_gemm={precision: (GroupedCurve(width=self.settings.widths.expert_width, **grouped.model_dump()),)},
            attention={precision: self._curve("device.attention", "attention.forward", core)},
            attention_backward={precision: self._curve("device.attention_backward", "attention.backward", core)},
            pads_values=True,
            memory_bound=self._curve("device.memory_bound", "memory_bound", "c = a + b into new memory"),
            passes={precision: {kind: self._pass(kind) for kind in PASSES}},
            kernel_seconds=_round(1 / tiny[0].rate),
            layer_forward_seconds=self._layer_seconds("forward"),
            layer_backward_seconds=self._layer_seconds("backward"),
        )

    def _layer_seconds(self, direction: str) -> float:
        (extra,) = self.points[f"layer.{direction}"]
        source = f"a layer's operations in turn less each repeated, 16 tokens; {_quality([extra])}"
        self._record(f"device.layer_{direction}_seconds", "measured", source)
        return _round(extra.seconds)

    def _pass(self, kind: Pass) -> PassRate:
        forward = fit_rate_curve(self.points[f"passes.{kind}.forward"])
        backward = self.points.get(f"passes.{kind}.backward")
        both = [*self.points[f"passes.{kind}.forward"], *(backward or [])]
        self._record(f"device.passes.{self.settings.precision}.{kind}", "measured", _quality(both))
        return PassRate(forward=forward, backward=fit_rate_curve(backward) if backward else None)

    def _curve(self, key: str, points_key: str, what: str) -> RateCurve:
        points = self.points[points_key]
        self._record(key, "measured", f"{what}; {_quality(points)}")
        return fit_rate_curve(points)

    def _judge_skew(self, grouped: RateCurve) -> None:
        """Write beside the grouped rates how well they price uneven rows: measured over predicted time."""
        skew = self.points["grouped_skew"]
        rates = np.interp(np.log([expert.size for expert in skew]), np.log(grouped.size), grouped.rate)
        predicted = float(sum(expert.work / rate for expert, rate in zip(skew, rates, strict=True)))
        note = f"uneven rows took {skew[0].seconds / predicted:.2f} of what the curve predicts"
        known = self.evidence["device.grouped_gemm"]
        self.evidence["device.grouped_gemm"] = known.model_copy(update={"source": f"{known.source}; {note}"})

    def _host(self, inside: Level) -> Host:
        """Slots = calls per second that a host's ranks make together x seconds of a call on a core of its own.

        They are no more than the cores, one for each rank that was alone: what exceeds them is noise of the machine.
        Ranks with devices of their own share none. What a meeting takes contains the latency of the call itself.
        """
        ranks, hosts = self.settings.ranks_per_host, self.settings.ranks // self.settings.ranks_per_host
        crowd = [points["crowd"][0] for points in self.per_rank]
        alone = self.points["alone"][0]
        slots = min(alone.size, sum(point.rate for point in crowd) / hosts * alone.seconds)
        walls = [point.seconds for points in self.per_rank for point in points.get("noise", ())]
        low, median, high = np.percentile(walls, [10, 50, 90])
        self._record("host.compute_slots", "measured", f"a fixed kernel on {int(alone.size)} and on all {ranks} ranks")
        self._record("host.noise", "measured", f"{len(walls)} runs of a fixed kernel between the measurements")
        return Host(
            ranks=ranks,
            compute_slots=float(ranks) if self.settings.device_bytes else round(slots, 3),
            meeting_seconds=self._meetings(inside),
            noise=round(float((high - low) / median), 3),
        )

    def _meetings(self, inside: Level) -> dict[int, float]:
        """By ranks in the group: what an all-to-all takes after computing, less its latency without."""
        found: dict[int, float] = {}
        for grouping in groupings(self.settings.ranks, self.settings.ranks_per_host):
            for point in self.points.get(f"meeting.{grouping.size}", ()):
                cost = inside.group_cost.get(grouping.size, inside.cost)["all_to_all"]
                found[grouping.size] = _round(max(0.0, point.seconds - cost.latency_seconds))
                source = f"a small all-to-all after every 5 ms of computing, less its latency; {_quality([point])}"
                self._record(f"host.meeting_seconds.{grouping.size}", "measured", source)
        return found

    def _levels(self) -> tuple[Level, ...]:
        found = groupings(self.settings.ranks, self.settings.ranks_per_host)
        if not found:
            return (self._alone(),)
        names = dict.fromkeys(grouping.level for grouping in found)
        return tuple(self._level(name, [grouping for grouping in found if grouping.level == name]) for name in names)

    def _level(self, name: str, found: Sequence[Grouping]) -> Level:
        """The last grouping holds all ranks of the level."""
        *parts, whole = found
        send = self._link("send", f"{name}.send", f"levels.{name}.cost.send", "a message there and back of neighbours")
        costs = {part.size: self._costs(part, f"levels.{name}.group_cost.{part.size}") for part in parts}
        cost = self._costs(whole, f"levels.{name}.cost")
        cost["send"] = send
        self._judge_uneven(name, cost["all_to_all"])
        return Level(name=name, ranks=whole.size, cost=cost, group_cost=costs)

    def _costs(self, grouping: Grouping, key: str) -> dict[Collective, LinkCost]:
        return {
            collective: self._link(
                collective,
                f"{grouping.level}.{collective}.{grouping.size}",
                f"{key}.{collective}",
                _describe(grouping, self.settings.ranks),
            )
            for collective in COLLECTIVES
            if collective != "send"
        }

    def _alone(self) -> Level:
        """One rank exchanges only with itself: a copy in its memory."""
        curve = fit_rate_curve(self.points["memory_bound"])
        cost = LinkCost(latency_seconds=1 / self.points["kernel_seconds"][0].rate, bandwidth_bytes_per_s=curve.rate[-1])
        self._record("levels.host", "assumed", "one rank exchanges with itself: a copy in memory")
        return Level(name="host", ranks=1, cost=dict.fromkeys(COLLECTIVES, cost))

    def _link(self, collective: Collective, points_key: str, key: str, what: str) -> LinkCost:
        points = self.points.get(points_key, [])
        if len(points) < 2:
            raise MachineError(f"measuring {collective}: {len(points)} of at least 2 message sizes were measured")
        cost, residual = fit_link_cost([point.size for point in points], [point.seconds for point in points])
        self._record(key, "fitted", f"{what}; {_quality(points)}", residual)
        return cost

    def _judge_uneven(self, level: str, cost: LinkCost) -> None:
        uneven = self.points[f"{level}.all_to_all_skew"]
        measured = float(np.median([point.seconds for point in uneven]))
        predicted = cost.latency_seconds + uneven[0].size / cost.bandwidth_bytes_per_s
        key = f"levels.{level}.cost.all_to_all"
        note = f"an uneven call took {measured / predicted:.2f} of what its busiest rank predicts"
        self.evidence[key] = self.evidence[key].model_copy(update={"source": f"{self.evidence[key].source}; {note}"})

    def _record(self, key: str, kind, source: str, residual: float | None = None) -> None:
        software = self.settings.software
        versions = ", ".join(f"{name} {software[name]}" for name in ("torch", "python", "cpu") if name in software)
        self.evidence[key] = Evidence(kind=kind, source=source, date=self.date, software=versions, residual=residual)


def _describe(grouping: Grouping, ranks: int) -> str:
    """The groups of a collective in words."""
    if grouping.size == ranks:
        return f"all {ranks} ranks"
    apart = f", {grouping.stride} apart," if grouping.stride > 1 else ""
    return f"{ranks // grouping.size} groups of {grouping.size} ranks{apart} at once"


def _quality(points: Sequence[Point]) -> str:
    """How the samples behind some points look, in words."""
    kept, dropped = sum(point.kept for point in points), sum(point.dropped for point in points)
    spread = float(np.median([point.spread for point in points]))
    samples, outliers = format_number(kept, "sample"), format_number(dropped, "outlier")
    return f"{samples}, {outliers} dropped, typical spread {spread:.0%}"


def _round(value: float) -> float:
    return float(f"{value:.6g}")
