"""Megatron's arguments read into a MegatronJob, and those whose memory the profile does not describe.

Model and strategy come from the one mapping of arguments (specs/megatron); here is what only memory depends on.
Meanings: megatron.training.arguments and TransformerConfig of megatron-core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.resources.megatron.job import AttentionCore, CrossEntropy, MegatronJob, Options
from pipermoe.resources.megatron.layout import StageLayout, split_stages, stages_of
from pipermoe.resources.megatron.release import NEWEST, Release, has_index_add, predicted_logits_stay
from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.model import read_model
from pipermoe.specs.megatron.patterns import read_layout
from pipermoe.specs.megatron.strategy import read_strategy
from pipermoe.specs.megatron.train import read_train
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy

STATE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "uint8": 1}

# Argument and the values of it that the profile describes.
_DESCRIBED: dict[str, tuple[object, ...]] = {
    "bf16": (True,),
    "fp8": (None,),
    "fp4": (None,),
    "optimizer": ("adam",),
    "data_parallel_sharding_strategy": (None, "no_shard"),
    "use_megatron_fsdp": (False,),
    "use_torch_fsdp2": (False,),
    "fine_grained_activation_offloading": (False,),
    "cpu_offloading_num_layers": (0,),
    "optimizer_cpu_offload": (False,),
    "overlap_moe_expert_parallel_comm": (False,),
    "cuda_graph_impl": ("none",),
    "enable_cuda_graph": (False,),
    "external_cuda_graph": (False,),
    "moe_latent_size": (None,),
    "moe_shared_expert_overlap": (False,),
    "use_grouped_gemm_for_dense_mlp": (False,),
    "transformer_impl": ("transformer_engine",),
}


def undescribed(arguments: Arguments) -> Iterator[str]:
    """`argument = value` of everything given that changes memory in a way that the profile does not describe."""
    for name, values in _DESCRIBED.items():
        if (name in arguments or name == "bf16") and arguments[name] not in values:
            yield f"{name} = {arguments[name]}"
    if arguments["moe_expert_capacity_factor"] and not arguments["moe_pad_expert_input_to_capacity"]:
        yield "moe_expert_capacity_factor without padding"


def read_job(
    arguments: Arguments, world_size: int, compute_capability: int = 9, release: Release = NEWEST
) -> MegatronJob:
    """The job that Megatron runs with `arguments` on `world_size` ranks. Raises UserError for what is not one.

    `compute_capability` (8 Ampere, 9 Hopper, 10 Blackwell) decides which attention core TransformerEngine picks,
    `release` what Megatron-Core keeps (resources/megatron/release.py).
    """
    model, train = read_model(arguments), read_train(arguments)
    strategy, _ = read_strategy(arguments, world_size, model.num_layers)
    return MegatronJob(
        model=model,
        strategy=strategy,
        seq_len=train.seq_len,
        global_batch_size=train.global_batch_size,
        stages=_read_stages(arguments, model, strategy),
        options=_read_options(arguments, model, strategy, compute_capability, release),
    )


def _read_stages(arguments: Arguments, model: ModelSpec, strategy: Strategy) -> tuple[StageLayout, ...]:
    text = arguments["pipeline_model_parallel_layout"]
    if text:
        return stages_of(read_layout(text), model.num_layers, model.mtp_layers)
    return split_stages(model.num_layers, strategy.num_stages, strategy.layer_split, model.mtp_layers)


def _read_options(
    arguments: Arguments, model: ModelSpec, strategy: Strategy, compute_capability: int, release: Release
) -> Options:
    precise = arguments["use_precision_aware_optimizer"]
    moments = [STATE_BYTES[arguments[name]] if precise else 4 for name in ("exp_avg_dtype", "exp_avg_sq_dtype")]
    learned = arguments["position_embedding_type"] == "learned_absolute" and model.attention.kind == "gqa"
    return Options(
        learned_positions=(arguments["max_position_embeddings"] or 0) * learned,
        rotary_tables=0 if learned else _rotary_tables(arguments, model),
        rope_fusion=arguments["apply_rope_fusion"],
        sequence_parallel=arguments["sequence_parallel"] and strategy.tensor_parallel > 1,
        distributed_optimizer=arguments["use_distributed_optimizer"],
        optimizer_instances=arguments["num_distributed_optimizer_instances"],
        gradient_accumulation_fusion=arguments["gradient_accumulation_fusion"],
        attention_core=_attention_core(arguments, compute_capability),
        attention_dropout=arguments["attention_dropout"],
        hidden_dropout=arguments["hidden_dropout"],
        cross_entropy=_cross_entropy(arguments),
        predicted_logits_stay=predicted_logits_stay(release),
        moe_dispatcher=arguments["moe_token_dispatcher_type"],
        moe_permute_fusion=arguments["moe_permute_fusion"],
        index_add=_sums_by_index_add(arguments, release),
        grouped_gemm=arguments["moe_grouped_gemm"],
        swiglu_fusion=arguments["bias_swiglu_fusion"],
        attention_mask=arguments["create_attention_mask_in_dataloader"],
        main_gradient_bytes=2 if arguments["grad_reduce_in_bf16"] else 4,
        main_weight_bytes=STATE_BYTES[arguments["main_params_dtype"]] if precise else 4,
        moment_bytes=sum(moments),
        capacity_factor=arguments["moe_expert_capacity_factor"] or 0.0,
        recompute=_recomputed_modules(arguments),
        recomputed_layers=_recomputed_layers(arguments),
    )


def _rotary_tables(arguments: Arguments, model: ModelSpec) -> int:
    """Tables that a rotary embedding keeps: angles, and where they are stretched (yarn) cosines and sines."""
    if model.attention.kind == "mla":
        return 1 if arguments["rope_type"] == "rope" else 3
    return 3 if arguments["position_embedding_type"] == "yarn" else 1


def _attention_core(arguments: Arguments, compute_capability: int) -> AttentionCore:
    """The named backend; else cuDNN's from Hopper on, FlashAttention on Ampere (TE `get_attention_backend`).

    On Blackwell cuDNN has no deterministic backward with dropout (TE common/fused_attn/fused_attn.cpp).
    """
    named: dict[str, AttentionCore] = {"unfused": "unfused", "flash": "flash", "fused": "cudnn"}
    refused = compute_capability >= 10 and arguments["deterministic_mode"] and arguments["attention_dropout"] > 0
    return named.get(arguments["attention_backend"], "cudnn" if compute_capability >= 9 and not refused else "flash")


def _sums_by_index_add(arguments: Arguments, release: Release) -> bool:
    """Deterministic mode, unless TransformerEngine's fused kernel sums."""
    return arguments["deterministic_mode"] and not arguments["moe_permute_fusion"] and has_index_add(release)


def _cross_entropy(arguments: Arguments) -> CrossEntropy:
    return arguments["cross_entropy_fusion_impl"] if arguments["cross_entropy_loss_fusion"] else "unfused"


def _recomputed_modules(arguments: Arguments) -> frozenset[str]:
    """Modules of selective recomputation; `core_attn` is what it means when none is named."""
    selective = arguments["recompute_activations"] or arguments["recompute_granularity"] == "selective"
    return frozenset(arguments["recompute_modules"] or ["core_attn"]) if selective else frozenset()


def _recomputed_layers(arguments: Arguments) -> int:
    """Layers of each stage that full recomputation covers: `block` the first N, `uniform` all."""
    if arguments["recompute_granularity"] != "full":
        return 0
    if arguments["recompute_method"] == "block":
        return arguments["recompute_num_layers"] or 0
    return arguments["num_layers"]
