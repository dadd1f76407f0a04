"""From a published row to what the resource model reads: model, machine, job and strategy, or why that cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from pipermoe.resources.flops import head_forward_flops, layer_forward_flops
from pipermoe.schedule.builders import RECIPES as SCHEDULES
from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.documents import read_mapping
from pipermoe.specs.legality import LEGAL, violations
from pipermoe.specs.megatron.patterns import read_layout
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.platform_file import load_platform, platform_names
from pipermoe.specs.precision import Precision
from pipermoe.specs.software import SoftwareProfile, load_software, product_per_expert, under
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig
from pipermoe.validate.dispatcher import dispatch_rates
from pipermoe.validate.rows import PublishedRow


class NotCovered(Exception):
    """Why a row cannot be predicted: something it does not say, or that the model does not have."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A row as a prediction needs it, and the step time that it reports.

    `assumed`: the source does not give the micro-batch; one sequence is taken, as Megatron's recipes for MoE do.
    """

    model: ModelSpec
    platform: Platform
    train: TrainConfig
    strategy: Strategy
    software: str
    measured_seconds: float
    assumed: bool = False


def recipe_of(row: PublishedRow, software: SoftwareProfile | None = None) -> Recipe:
    """The recipe of a row under the profile of its software, or another. Raises `NotCovered`."""
    missing = [name for name in ("n_gpus", "ep", "pp", "gbs", "seq") if getattr(row, name) is None]
    if missing:
        raise NotCovered(f"the source does not give {', '.join(missing)}")
    assumed = row.mbs is None
    row = row.model_copy(update={"mbs": 1}) if assumed else row
    model = _model(row)
    train = TrainConfig(seq_len=_known(row.seq), global_batch_size=_known(row.gbs), precision=_precision(row))
    strategy = _strategy(row, model)
    broken = violations(strategy, model, train, _known(row.n_gpus), LEGAL)
    if broken:
        raise NotCovered(broken[0])
    software = software or load_software(_software(row))
    machine = _platform(row.gpu)
    dispatch = dispatch_rates(machine, model.moe, strategy.expert_parallel, row.dispatcher)
    platform = under(machine, software, dispatch)
    if software.product_per_expert:
        platform = product_per_expert(platform, model.hidden_size, model.moe.expert_width)
    return Recipe(model, platform, train, strategy, software.name, _step_seconds(row, model, train), assumed)


def _known(value: int | None) -> int:
    assert value is not None
    return value


def _model(row: PublishedRow) -> ModelSpec:
    alias = aliases()["models"].get(row.model, row.model.lower())
    name, changes = (alias, {}) if isinstance(alias, str) else (alias["base"], alias)
    if name not in model_names():
        raise NotCovered(f"model {row.model!r} is not in the catalogue")
    model = load_model(name)
    moe = model.moe.model_copy(update={key: value for key, value in changes.items() if hasattr(model.moe, key)})
    own = {key: value for key, value in changes.items() if hasattr(model, key)}
    model = model.model_copy(update=own | {"moe": moe})
    predicts = "no MTP" not in row.remark and "w/o MTP" not in row.model
    # A multi-token prediction module is priced as one more layer; its head and loss are left out.
    layers = model.num_layers + (model.mtp_layers if predicts else 0)
    return model.model_copy(update={"num_layers": layers, "mtp_layers": 0})


@cache
def _platform(gpu: str) -> Platform:
    name = aliases()["machines"].get(gpu, gpu.lower())
    if name not in platform_names():
        raise NotCovered(f"machine {gpu!r} is not in the catalogue")
    return load_platform(name)


def _software(row: PublishedRow) -> str:
    for words, profile in aliases()["software"].items():
        if words in row.source:
            return profile
    raise NotCovered(f"no software profile for {row.source!r}")


def _precision(row: PublishedRow) -> Precision:
    named = row.precision.upper()
    if "FP8" in named:
        return "fp8"
    for precision in ("bf16", "fp16", "fp32"):
        if precision.upper() in named:
            return precision
    raise NotCovered(f"precision {row.precision!r}")


def _strategy(row: PublishedRow, model: ModelSpec) -> Strategy:
    pp, tp, cp, etp, ep = (_known(row.pp), row.tp or 1, row.cp or 1, row.etp or 1, _known(row.ep))
    ranks_per_stage, rest = divmod(_known(row.n_gpus), pp)
    experts, uneven = divmod(ranks_per_stage, ep * etp)
    if rest or uneven:
        raise NotCovered(f"pp {pp} x ep {ep} does not divide {row.n_gpus} GPUs")
    virtual = (row.vpp or 1) if pp > 1 else 1
    name = "1f1b" if virtual == 1 else "interleaved-1f1b"
    if row.overlap == "on" and f"{name}-overlap" in SCHEDULES:
        name += "-overlap"
    # A pipeline keeps what it has gathered, and reduces once a step (torch's, which FSDP runs under).
    zero = 3 if "FSDP" in row.remark and pp == 1 else 1
    return Strategy(
        pipeline_parallel=pp,
        virtual_stages=virtual,
        data_parallel=ranks_per_stage // (tp * cp),
        context_parallel=cp,
        tensor_parallel=tp,
        expert_parallel=ep,
        expert_tensor_parallel=etp,
        expert_data_parallel=experts,
        micro_batch_size=_known(row.mbs),
        schedule=name,
        layer_split=_layer_split(model, pp * virtual),
        **_recompute(row),
        zero_dense=zero,
        zero_expert=zero,
    )


def _layer_split(model: ModelSpec, stages: int) -> tuple[int, ...]:
    """The layers of every stage of the recipe's layout, if it has one; a prediction layer is one more on the last."""
    layout = aliases()["layouts"].get(model.name, {}).get(str(stages))
    if layout is None:
        return ()
    *split, last = read_layout(layout).decoder
    return (*split, model.num_layers - sum(split)) if last else ()


def _recompute(row: PublishedRow) -> dict[str, Any]:
    """Megatron's names of recomputed modules as ours; those that only it has are left out (docs/accuracy.md)."""
    if row.recompute.startswith("full"):
        return {"recompute": "full"}
    names = (aliases()["recompute"].get(name.strip()) for name in row.recompute.split("+"))
    modules = tuple(name for name in names if name)
    return {"recompute": "selective", "recompute_modules": modules} if modules else {}


def _step_seconds(row: PublishedRow, model: ModelSpec, train: TrainConfig) -> float:
    """Seconds of a step from whatever the source gives. Model FLOPs count causal attention and no recomputation."""
    value, gpus, tokens = float(row.value), _known(row.n_gpus), train.tokens_per_step
    match row.metric:
        case "step time s":
            return value
        case "step time ms":
            return value / 1e3
        case "tokens/s/GPU":
            return tokens / (value * gpus)
        case "model TFLOPS/GPU" | "TFLOPS/GPU":
            return model_flops(model, train) / (value * 1e12 * gpus)
        case "MFU %":
            peak = load_platform(aliases()["machines"][row.gpu]).device.peak_flops_per_s["bf16"]
            return model_flops(model, train) / (value / 100 * peak * gpus)
    raise NotCovered(f"metric {row.metric!r} is no step time")


def model_flops(model: ModelSpec, train: TrainConfig) -> float:
    """FLOPs of the model in one step: three forwards with causal attention, head included."""
    counts: dict[str, Any] = {"tokens": train.tokens_per_step, "seq_len": train.seq_len, "causal": True}
    layers = sum(layer_forward_flops(model, layer, **counts).total for layer in range(model.num_layers))
    return 3.0 * (layers + head_forward_flops(model, train.tokens_per_step))


@cache
def aliases() -> dict[str, dict[str, Any]]:
    """What published names are in the catalogue (catalogue/validation/aliases.toml)."""
    with resources.as_file(resources.files("pipermoe") / "catalogue" / "validation" / "aliases.toml") as path:
        return read_mapping(path)
