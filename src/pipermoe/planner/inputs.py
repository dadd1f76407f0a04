"""Every number that entered a plan, in one flat list, with where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from pipermoe.planner.job import HEADROOM, Job
from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile
from pipermoe.resources.step import peak_flops_per_rank
from pipermoe.specs.device import RateCurve
from pipermoe.specs.plan import PlanInput
from pipermoe.specs.platform import Platform
from pipermoe.specs.train import TrainConfig


def plan_inputs(job: Job) -> dict[str, PlanInput]:
    """Dotted key -> value and source, ready for the plan file."""
    model, platform, train, imbalance, headroom = job.model, job.platform, job.train, job.imbalance, job.headroom
    peak, given = peak_flops_per_rank(platform, train, job.world_size), job.memory_bytes != platform.memory_budget_bytes
    budget = PlanInput(
        value=job.memory_bytes,
        source="given for this plan" if given else f"platform {platform.name}: memory less what is reserved",
    )
    inputs = {
        "model": PlanInput(value=model.name, source=model.source or "not named in the model file"),
        "world_size": PlanInput(value=job.world_size, source="job"),
        "train.seq_len": PlanInput(value=train.seq_len, source="job"),
        "train.global_batch_size": PlanInput(value=train.global_batch_size, source="job"),
        "train.precision": PlanInput(value=train.precision, source="job"),
        "train.capacity_factor": PlanInput(value=train.capacity_factor, source="job"),
        "imbalance": PlanInput(
            value=imbalance,
            source="given for this plan: rows of the busiest rank over the mean"
            if imbalance != 1.0
            else "assumed: every expert gets the same number of rows",
        ),
        "peak_flops_per_s": PlanInput(value=peak, source=f"platform {platform.name}: the fastest product, per rank"),
        "memory_budget_bytes": budget,
        "headroom": PlanInput(value=headroom, source=_headroom_source(headroom)),
    }
    inputs |= {f"state_bytes.{name}": each for name, each in _state_bytes(train)}
    inputs |= {f"memory_profile.{name}": each for name, each in _memory_profile(RUNTIME)}
    for key, value in _platform_numbers(platform, train):
        inputs[f"platform.{key}"] = PlanInput(value=value, source=_source(platform, key))
    return inputs


def _headroom_source(headroom: float) -> str:
    if headroom != HEADROOM:
        return "given for this plan: the share of the memory that stays free"
    return "default: peaks are predicted within 2 %, and for even routing, which real text is not"


def _state_bytes(train: TrainConfig) -> Iterator[tuple[str, PlanInput]]:
    source = f"the recipe of {train.precision}" if train.state_bytes is None else "job: state_bytes"
    for name, value in train.recipe.state:
        yield name, PlanInput(value=value, source=f"{source}, bytes per parameter")


def _memory_profile(profile: MemoryProfile) -> Iterator[tuple[str, PlanInput]]:
    for each in fields(profile):
        yield each.name, PlanInput(value=getattr(profile, each.name), source="the memory profile of this runtime")


def _platform_numbers(platform: Platform, train: TrainConfig) -> Iterator[tuple[str, float | str]]:
    device, precision = platform.device, train.precision
    yield "host.compute_slots", platform.host.compute_slots
    for ranks, seconds in platform.host.meeting_seconds.items():
        yield f"host.meeting_seconds.{ranks}", seconds
    for name in ("kernel_seconds", "issue_seconds", "layer_forward_seconds", "layer_backward_seconds", "pads_values"):
        yield f"device.{name}", getattr(device, name)
    for name in ("gemm", "attention", "attention_backward"):
        yield f"device.{name}", _summary(getattr(device, name)[precision], "FLOP/s")
    for curve in device.grouped_gemm[precision]:
        yield f"device.grouped_gemm of width {curve.width}", _summary(curve, "FLOP/s")
    yield "device.memory_bound", _summary(device.memory_bound, "B/s")
    for name, rate in device.passes.get(precision, {}).items():
        yield f"device.passes.{precision}.{name}", _summary(rate.forward, "elements/s")
    for level in platform.levels:
        for name, cost in level.cost.items():
            latency, bandwidth = cost.latency_seconds * 1e6, cost.bandwidth_bytes_per_s / 1e9
            yield f"levels.{level.name}.cost.{name}", f"{latency:.4g} us + bytes / {bandwidth:.4g} GB/s"
        if level.link is not None:
            port = platform.port_bytes_per_s(platform.levels.index(level)) / 1e9
            yield f"levels.{level.name}.link", f"{level.link.topology}, {port:.4g} GB/s a rank"


def _summary(curve: RateCurve, unit: str) -> str:
    return f"{min(curve.rate):.3g} to {max(curve.rate):.3g} {unit}, {len(curve.size)} points"


def _source(platform: Platform, key: str) -> str:
    evidence = platform.evidence_for(key)
    if evidence is None:
        return f"platform {platform.name}" + (f" ({platform.source})" if platform.source else "")
    return f"{evidence.kind}: {evidence.source}"
