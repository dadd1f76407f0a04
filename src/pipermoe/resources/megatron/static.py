"""Bytes that a Megatron rank holds between two steps: states, and what its libraries keep for the next step."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipermoe.resources.megatron.head import stage_modules
from pipermoe.resources.megatron.job import Machine, MegatronJob
from pipermoe.resources.megatron.layout import StageLayout
from pipermoe.resources.megatron.tensors import BF16, BOOL, FP32, Weight
from pipermoe.specs.model import LatentAttention


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """Bytes of one rank. `total` is what `torch.cuda.memory_allocated()` says after a step."""

    weights: float
    main_gradients: float
    optimizer: float  # fp32 master weights and two moments, divided by the distributed optimizer
    gradient_placeholders: float  # one bf16 tensor for each shape of a weight whose GEMM accumulates its gradient
    gather_buffer: float  # the one buffer that sequence-parallel gathers share
    stage_inputs: float  # of each model chunk the last input received and its gradient
    rotary_tables: float
    causal_mask: float  # of the unfused attention core, one for the sequence length
    te_workspace: float
    cublas_workspace: float
    runtime_slack: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def static_memory(job: MegatronJob, machine: Machine, pipeline_rank: int) -> StaticMemory:
    """What pipeline rank `pipeline_rank` holds after a step."""
    options, stages = job.options, rank_stages(job, pipeline_rank)
    weights = [weight for stage in stages for module in stage_modules(job, stage) for weight in module.weights]
    elements = sum(weight.elements for weight in weights)
    return StaticMemory(
        weights=elements * BF16,
        main_gradients=elements * options.main_gradient_bytes,
        optimizer=_optimizer_bytes(job, weights),
        gradient_placeholders=_placeholder_bytes(weights) * options.gradient_accumulation_fusion,
        gather_buffer=_gather_buffer_bytes(job, stages),
        stage_inputs=sum(2 * job.shard * job.model.hidden_size * BF16 for stage in stages if not stage.embedding),
        rotary_tables=_rotary_table_bytes(job, stages),
        causal_mask=job.seq_len**2 * BOOL * (options.attention_core == "unfused"),
        te_workspace=machine.te_workspace * (1 + machine.te_grouped_streams * options.grouped_gemm),
        cublas_workspace=machine.cublas_workspace * machine.cublas_threads,
        runtime_slack=machine.runtime_slack,
    )


def rank_stages(job: MegatronJob, pipeline_rank: int) -> tuple[StageLayout, ...]:
    """The stages (model chunks) of a pipeline rank: stage i lives on rank i modulo pp."""
    return job.stages[pipeline_rank :: job.strategy.pipeline_parallel]


def _optimizer_bytes(job: MegatronJob, weights: list[Weight]) -> float:
    """Master weight and moments: dense ones over dp x cp, routed experts over edp, within one optimizer instance."""
    strategy, options = job.strategy, job.options
    dense = sum(weight.elements for weight in weights if not weight.routed)
    routed = sum(weight.elements for weight in weights if weight.routed)
    shards = routed_shards = 1
    if options.distributed_optimizer:
        shards = strategy.data_parallel * strategy.context_parallel // options.optimizer_instances
        routed_shards = max(1, strategy.expert_data_parallel // options.optimizer_instances)
    return (options.main_weight_bytes + options.moment_bytes) * (dense / shards + routed / routed_shards)


def _placeholder_bytes(weights: list[Weight]) -> float:
    """TransformerEngine caches them by shape (pytorch/module/base.py), Megatron's output layer uses the same cache."""
    shapes = {weight.shape for weight in weights if weight.fused_gradient}
    return sum(rows * columns * BF16 for rows, columns in shapes)


def _gather_buffer_bytes(job: MegatronJob, stages: tuple[StageLayout, ...]) -> float:
    """As large as the largest gather: of the output layer's input, or of the allgather dispatcher."""
    strategy, options = job.strategy, job.options
    tokens = job.tokens * (options.sequence_parallel and any(stage.loss for stage in stages))
    if options.moe_dispatcher == "allgather" and strategy.expert_parallel * strategy.expert_tensor_parallel > 1:
        tokens = max(tokens, job.expert_group_tokens)
    return tokens * job.model.hidden_size * BF16


def _rotary_table_bytes(job: MegatronJob, stages: tuple[StageLayout, ...]) -> float:
    """Tables over all positions: of each chunk one rotary embedding, of each layer with latent attention."""
    attention = job.model.attention
    if isinstance(attention, LatentAttention):
        embeddings, width = sum(len(stage.layers) + stage.mtp_layers for stage in stages), attention.qk_rope_head_dim
    else:
        embeddings, width = len(stages), attention.head_dim
    return embeddings * job.options.rotary_tables * job.seq_len * width * FP32
