"""Strategy <-> Megatron-LM arguments: degrees, stages, schedule, recomputation, sharding, dispatch.

Degrees that one argument gives alone are rows of `table.STRATEGY`; here is what takes several arguments on either side.
The data-parallel degrees are what the number of ranks leaves over, as Megatron computes them.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.specs.documents import validate
from pipermoe.specs.errors import UserError
from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.options import Value
from pipermoe.specs.megatron.patterns import Layout, read_layout
from pipermoe.specs.megatron.table import STRATEGY, Tree, read_rows, write_rows
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy

# Our module and Megatron's that drops the same tensors (`recompute_modules` of its TransformerConfig).
RECOMPUTE = {"norm": "layernorm", "moe_act": "moe_act", "shared_experts": "shared_experts", "dense_mlp": "mlp"}
SHARDING = ("no_shard", "optim", "optim_grads", "optim_grads_params")  # Megatron-FSDP's name of each ZeRO level
DISPATCHERS: dict[str, dict[str, Value]] = {
    "all_to_all": {"moe_token_dispatcher_type": "alltoall"},
    "deduplicated": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
}


def write_strategy(strategy: Strategy, model: ModelSpec) -> dict[str, Value]:
    """The arguments of an arrangement of `model` that Megatron can express."""
    arguments = write_rows(STRATEGY, strategy) | {
        # Megatron's default is the tensor-parallel degree, which few who leave it out mean.
        "expert_tensor_parallel_size": strategy.expert_tensor_parallel,
        "sequence_parallel": strategy.tensor_parallel > 1,
        "moe_grouped_gemm": True,
        "overlap_moe_expert_parallel_comm": strategy.schedule.endswith("-overlap"),
    }
    if strategy.num_stages > 1:
        sizes = [len(layers) for layers in split_layers(model.num_layers, strategy.num_stages, strategy.layer_split)]
        predictions = (0,) * (len(sizes) - 1) + (model.mtp_layers,)
        arguments["pipeline_model_parallel_layout"] = str(Layout(tuple(sizes), predictions))
    if strategy.recompute == "full":
        arguments |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif strategy.recompute == "selective":
        modules = [RECOMPUTE[module] for module in strategy.recompute_modules]
        arguments |= {"recompute_granularity": "selective", "recompute_modules": modules}
    return arguments | _write_sharding(max(strategy.sharding_levels, default=0)) | DISPATCHERS[strategy.dispatcher]


def read_strategy(arguments: Arguments, world_size: int, num_layers: int) -> tuple[Strategy, list[str]]:
    """The strategy of `world_size` ranks that `arguments` describe, and remarks. UserError where there is none."""
    tree = read_rows(STRATEGY, arguments)
    pp, tp, cp = (tree[key] for key in ("pipeline_parallel", "tensor_parallel", "context_parallel"))
    etp = arguments["expert_tensor_parallel_size"] or tp
    remarks: list[str] = []
    tree |= {
        "data_parallel": _left_over(world_size, "tensor, context and pipeline", tp * cp * pp),
        "expert_tensor_parallel": etp,
        "expert_data_parallel": _left_over(
            world_size, "expert, expert tensor and pipeline", tree["expert_parallel"] * etp * pp
        ),
        "dispatcher": _read_dispatcher(arguments, remarks),
    }
    tree |= _read_stages(arguments, pp, num_layers, remarks) | _read_recompute(arguments, remarks)
    tree["schedule"] = "interleaved-1f1b" if tree["virtual_stages"] > 1 else "1f1b"
    if arguments["overlap_moe_expert_parallel_comm"]:
        tree["schedule"] += "-overlap"
    level = _read_sharding(arguments)
    tree["zero_dense"] = level if tree["data_parallel"] * cp > 1 else 0
    tree["zero_expert"] = level if tree["expert_data_parallel"] > 1 else 0
    return validate(tree, Strategy, where="Megatron arguments"), remarks


def _left_over(world_size: int, names: str, product: int) -> int:
    if world_size % product:
        rule = f"must be a multiple of the {names} parallel sizes, {product} together"
        raise UserError(f"--world-size = {world_size}: {rule}; nearest: {max(world_size // product, 1) * product}")
    return world_size // product


def _read_stages(arguments: Arguments, pp: int, num_layers: int, remarks: list[str]) -> Tree:
    """Virtual stages, and the split of layers where it is not the even one."""
    split = ()
    if arguments["pipeline_model_parallel_layout"]:
        split = read_layout(arguments["pipeline_model_parallel_layout"]).decoder
        if len(split) % pp:
            rule = f"has {len(split)} stages, which is no multiple of --pipeline-model-parallel-size {pp}"
            raise UserError(f"--pipeline-model-parallel-layout: {rule}")
        virtual_stages = len(split) // pp
    else:
        virtual_stages = _virtual_stages(arguments, pp, num_layers)
        if virtual_stages == 1 and pp > 1:
            split = tuple(_uneven(arguments, pp, num_layers))
    if 0 in split:
        remarks.append("stages without decoder layers have no counterpart here: read as an even split")
        split = ()
    if (
        split
        and num_layers >= len(split)
        and list(split) == [len(layers) for layers in split_layers(num_layers, len(split))]
    ):
        split = ()
    return {"virtual_stages": virtual_stages, "layer_split": split}


def _virtual_stages(arguments: Arguments, pp: int, num_layers: int) -> int:
    if arguments["num_virtual_stages_per_pipeline_rank"]:
        return arguments["num_virtual_stages_per_pipeline_rank"]
    per_stage = arguments["num_layers_per_virtual_pipeline_stage"]
    if not per_stage:
        return 1
    layers = num_layers + sum(_unit_stages(arguments))
    if layers % (pp * per_stage):
        rule = f"times --pipeline-model-parallel-size {pp} must divide the {layers} layers"
        raise UserError(f"--num-layers-per-virtual-pipeline-stage = {per_stage}: {rule}")
    return layers // pp // per_stage


def _unit_stages(arguments: Arguments) -> tuple[int, int]:
    """Whether the embedding and the loss count as a layer each in the split."""
    names = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    first, last = (int(arguments[name]) for name in names)
    return first, last


def _uneven(arguments: Arguments, pp: int, num_layers: int) -> Iterator[int]:
    """Layers of every stage: as given for the first and last, the rest even, embedding and loss counted if asked."""
    embedding, loss = _unit_stages(arguments)
    first, last = arguments["decoder_first_pipeline_num_layers"], arguments["decoder_last_pipeline_num_layers"]
    free = pp - (first is not None) - (last is not None)
    rest = num_layers + embedding + loss - (first or 0) - (last or 0)
    even = rest // free if free else 0
    if even * free != rest:
        raise UserError(f"--pipeline-model-parallel-size = {pp}: {rest} layers do not divide over {free} stages")
    for stage in range(pp):
        if stage == 0:
            yield first if first is not None else even - embedding
        elif stage == pp - 1:
            yield last if last is not None else even - loss
        else:
            yield even


def _read_recompute(arguments: Arguments, remarks: list[str]) -> Tree:
    granularity = "selective" if arguments["recompute_activations"] else arguments["recompute_granularity"]
    if granularity == "full":
        if arguments["recompute_method"] == "block" or (arguments["recompute_num_layers"] or 1) > 1:
            remarks.append("--recompute-num-layers is read as every layer by itself")
        return {"recompute": "full"}
    if granularity is None:
        return {"recompute": "none"}
    wanted = arguments["recompute_modules"] or ["core_attn"]
    modules = [ours for ours, theirs in RECOMPUTE.items() if theirs in wanted]
    for theirs in sorted(set(wanted) - set(RECOMPUTE.values())):
        reason = "fused attention keeps no square" if theirs == "core_attn" else "no counterpart here"
        remarks.append(f"--recompute-modules {theirs}: {reason}; read as not recomputed")
    return {"recompute": "selective" if modules else "none", "recompute_modules": modules}


def _write_sharding(level: int) -> dict[str, Value]:
    if level == 0:
        return {}
    overlapped: dict[str, Value] = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    if level == 1:
        return {"use_distributed_optimizer": True} | overlapped
    fsdp: dict[str, Value] = {
        "use_megatron_fsdp": True,
        "data_parallel_sharding_strategy": SHARDING[level],
        "ckpt_format": "fsdp_dtensor",
        "gradient_accumulation_fusion": False,
    }
    return {"use_distributed_optimizer": True} | fsdp | overlapped


def _read_sharding(arguments: Arguments) -> int:
    if arguments["use_megatron_fsdp"]:
        return SHARDING.index(arguments["data_parallel_sharding_strategy"])
    return 3 if arguments["use_torch_fsdp2"] else int(arguments["use_distributed_optimizer"])


def _read_dispatcher(arguments: Arguments, remarks: list[str]) -> str:
    kind = arguments["moe_token_dispatcher_type"]
    if kind == "allgather":
        remarks.append("--moe-token-dispatcher-type allgather: no counterpart here; read as all_to_all")
    return "deduplicated" if kind == "flex" else "all_to_all"
