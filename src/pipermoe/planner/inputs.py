"""Every number that entered a plan, in one flat list, with where it came from."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.resources.step import peak_flops_per_rank
from pipermoe.specs.device import RateCurve
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import PlanInput
from pipermoe.specs.platform import Platform
from pipermoe.specs.train import TrainConfig


def plan_inputs(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    world_size: int,
    memory_budget_bytes: int,
    *,
    budget_given: bool,
) -> dict[str, PlanInput]:
    """Dotted key -> value and source, ready for the plan file."""
    budget_source = "given for this plan" if budget_given else f"platform {platform.name}: memory less what is reserved"
    peak = peak_flops_per_rank(platform, train, world_size)
    inputs = {
        "model": PlanInput(value=model.name, source=model.source or "not named in the model file"),
        "train.seq_len": PlanInput(value=train.seq_len, source="job"),
        "train.global_batch_size": PlanInput(value=train.global_batch_size, source="job"),
        "train.precision": PlanInput(value=train.precision, source="job"),
        "routing": PlanInput(value="balanced", source="assumed: every expert gets the same number of tokens"),
        "peak_flops_per_s": PlanInput(value=peak, source=f"platform {platform.name}: the fastest product, per rank"),
        "memory_budget_bytes": PlanInput(value=memory_budget_bytes, source=budget_source),
    }
    for key, value in _platform_numbers(platform, train):
        inputs[f"platform.{key}"] = PlanInput(value=value, source=_source(platform, key))
    return inputs


def _platform_numbers(platform: Platform, train: TrainConfig) -> Iterator[tuple[str, float | str]]:
    device, precision = platform.device, train.precision
    yield "host.compute_slots", platform.host.compute_slots
    yield "device.kernel_seconds", device.kernel_seconds
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
