"""From the points that the ranks measured to a Platform: curves, fitted costs, and the evidence for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipermoe.measure.fits import fit_link_cost, fit_rate_curve
from pipermoe.measure.samples import Point, merge_ranks
from pipermoe.specs.device import PASSES, Device, GroupedCurve, Pass, PassRate, RateCurve
from pipermoe.specs.errors import MachineError
from pipermoe.specs.network import COLLECTIVES, Collective, Level, LinkCost
from pipermoe.specs.platform import Evidence, Host, Platform
from pipermoe.specs.precision import Precision

LEVEL = "host"


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the ranks do not measure: the names, sizes and versions that belong to a Platform."""

    name: str
    device: str
    memory_bytes: int
    memory_source: str
    reserved_bytes: int
    ranks: int
    expert_width: int
    date: str
    software: Mapping[str, str]
    precision: Precision = "fp32"


class Assembly:
    """The merged points of all ranks and the evidence that gathers while a Platform is made from them."""

    def __init__(self, ranks: Sequence[Mapping[str, Sequence[Point]]], facts: Circumstances) -> None:
        self.per_rank, self.facts = ranks, facts
        keys = dict.fromkeys(key for points in ranks for key in points)
        self.points = {key: merge_ranks([points[key] for points in ranks if key in points]) for key in keys}
        self.evidence: dict[str, Evidence] = {}

    def platform(self) -> Platform:
        """The Platform. Raises `MachineError` when the measurements do not make one."""
        facts = self.facts
        device, level = self._device(), self._level()
        return Platform(
            name=facts.name,
            source=f"measured with {facts.ranks} ranks on {facts.date}",
            device=device,
            host=self._host(),
            levels=(level,),
            reserved_bytes=facts.reserved_bytes,
            software=dict(facts.software),
            evidence=self.evidence,
        )

    def _device(self) -> Device:
        facts = self.facts
        gemm = self._curve("device.gemm", "gemm", "three products of a dense layer")
        grouped = self._curve("device.grouped_gemm", "grouped_gemm", "three products of the experts, equal rows")
        self._judge_skew(grouped)
        self._record("device.memory_bytes", "assumed", facts.memory_source)
        best = max(point.rate for key in ("gemm", "grouped_gemm") for point in self.points[key])
        self._record("device.peak_flops_per_s", "measured", "the fastest matrix product seen")
        tiny = self.points["kernel_seconds"]
        self._record(
            "device.kernel_seconds", "measured", f"a chain of tiny differentiable operations; {_quality(tiny)}"
        )
        core = "causal scaled_dot_product_attention"
        return Device(
            name=facts.device,
            memory_bytes=facts.memory_bytes,
            peak_flops_per_s={facts.precision: _round(best)},
            gemm={facts.precision: gemm},
            grouped_gemm={facts.precision: (GroupedCurve(width=facts.expert_width, **grouped.model_dump()),)},
            attention={facts.precision: self._curve("device.attention", "attention.forward", core)},
            attention_backward={facts.precision: self._curve("device.attention_backward", "attention.backward", core)},
            memory_bound=self._curve("device.memory_bound", "memory_bound", "c = a + b into new memory"),
            passes={facts.precision: {kind: self._pass(kind) for kind in PASSES}},
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
        self._record(f"device.passes.{self.facts.precision}.{kind}", "measured", _quality(both))
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

    def _host(self) -> Host:
        """Slots = calls per second that all ranks make together x seconds of a call on a core of its own."""
        ranks = self.facts.ranks
        crowd = [points["crowd"][0] for points in self.per_rank]
        alone = self.points["alone"][0]
        slots = min(float(ranks), sum(point.rate for point in crowd) * alone.seconds)
        walls = [point.seconds for points in self.per_rank for point in points.get("noise", ())]
        low, median, high = np.percentile(walls, [10, 50, 90])
        self._record(
            "host.compute_slots",
            "measured",
            f"a fixed kernel on {int(alone.size)} and on all {ranks} ranks, which meet every 5 ms",
        )
        self._record("host.noise", "measured", f"{len(walls)} runs of a fixed kernel between the measurements")
        return Host(ranks=ranks, compute_slots=round(slots, 3), noise=round(float((high - low) / median), 3))

    def _level(self) -> Level:
        ranks = self.facts.ranks
        if ranks == 1:
            return self._alone()
        sizes = sorted({int(key.split(".")[1]) for key in self.points if key.startswith("all_reduce.")})
        send = self._link("send", "send", f"levels.{LEVEL}.cost.send", "a message there and back between neighbours")
        costs: dict[int, dict[Collective, LinkCost]] = {}
        for size in sizes:
            where = "cost" if size == ranks else f"group_cost.{size}"
            costs[size] = {
                collective: self._link(
                    collective,
                    f"{collective}.{size}",
                    f"levels.{LEVEL}.{where}.{collective}",
                    _grouping(ranks, size),
                )
                for collective in COLLECTIVES
                if collective != "send"
            }
        whole: dict[Collective, LinkCost] = {"send": send, **costs.pop(ranks)}
        self._judge_uneven(whole["all_to_all"])
        return Level(name=LEVEL, ranks=ranks, cost=whole, group_cost=costs)

    def _alone(self) -> Level:
        """One rank exchanges only with itself: a copy in its memory."""
        curve = fit_rate_curve(self.points["memory_bound"])
        cost = LinkCost(latency_seconds=1 / self.points["kernel_seconds"][0].rate, bandwidth_bytes_per_s=curve.rate[-1])
        self._record(f"levels.{LEVEL}", "assumed", "one rank exchanges with itself: a copy in memory")
        return Level(name=LEVEL, ranks=1, cost=dict.fromkeys(COLLECTIVES, cost))

    def _link(self, collective: Collective, points_key: str, key: str, what: str) -> LinkCost:
        points = self.points.get(points_key, [])
        if len(points) < 2:
            raise MachineError(f"measuring {collective}: {len(points)} of at least 2 message sizes were measured")
        cost, residual = fit_link_cost([point.size for point in points], [point.seconds for point in points])
        self._record(key, "fitted", f"{what}; {_quality(points)}", residual)
        return cost

    def _judge_uneven(self, cost: LinkCost) -> None:
        uneven = self.points["all_to_all_skew"]
        measured = float(np.median([point.seconds for point in uneven]))
        busiest = max(points["all_to_all_skew"][0].size for points in self.per_rank)
        predicted = cost.latency_seconds + busiest / cost.bandwidth_bytes_per_s
        key = f"levels.{LEVEL}.cost.all_to_all"
        note = f"an uneven call took {measured / predicted:.2f} of what its busiest rank predicts"
        self.evidence[key] = self.evidence[key].model_copy(update={"source": f"{self.evidence[key].source}; {note}"})

    def _record(self, key: str, kind, source: str, residual: float | None = None) -> None:
        software = self.facts.software
        versions = ", ".join(f"{name} {software[name]}" for name in ("torch", "python", "cpu") if name in software)
        self.evidence[key] = Evidence(
            kind=kind, source=source, date=self.facts.date, software=versions, residual=residual
        )


def _grouping(ranks: int, size: int) -> str:
    return f"all {ranks} ranks" if size == ranks else f"{ranks // size} groups of {size} ranks at once"


def _quality(points: Sequence[Point]) -> str:
    """How the samples behind some points look, in words."""
    kept, dropped = sum(point.kept for point in points), sum(point.dropped for point in points)
    spread = float(np.median([point.spread for point in points]))
    return f"{kept} samples, {dropped} outliers dropped, typical spread {spread:.0%}"


def _round(value: float) -> float:
    return float(f"{value:.6g}")
