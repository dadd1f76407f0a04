"""The arguments that say the same as one field of ours, both ways from one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.options import Value

Tree = dict[str, Any]  # nested values of a record that is about to be validated


@dataclass(frozen=True, slots=True)
class Row:
    """`argument` in Megatron's namespace and `path` of the field; `none` is our value where Megatron's is None."""

    argument: str
    path: str
    none: object = None
    values: tuple[tuple[object, Value], ...] = ()  # (ours, theirs), where they differ


MODEL: tuple[Row, ...] = (
    Row("num_layers", "num_layers"),
    Row("hidden_size", "hidden_size"),
    Row("layernorm_epsilon", "norm_epsilon"),
    Row("normalization", "norm_bias", values=((False, "RMSNorm"), (True, "LayerNorm"))),
    Row("untie_embeddings_and_output_weights", "tie_word_embeddings", values=((False, True), (True, False))),
    Row("num_experts", "moe.num_experts"),
    Row("moe_router_topk", "moe.top_k"),
    Row("moe_shared_expert_intermediate_size", "moe.shared_width", none=0),
    Row("moe_shared_expert_gate", "moe.shared_gate"),
    Row("moe_router_score_function", "moe.router.score"),
    Row("moe_router_topk_scaling_factor", "moe.router.scaling_factor", none=1.0),
    Row("moe_router_num_groups", "moe.router.num_groups", none=1),
    Row("moe_router_group_topk", "moe.router.top_k_groups", none=1),
    Row("moe_router_enable_expert_bias", "moe.router.correction_bias", values=(("buffer", True), ("none", False))),
)

GROUPED_QUERY: tuple[Row, ...] = (
    Row("num_attention_heads", "num_heads"),
    Row("softmax_type", "sinks", values=((True, "learnable"), (False, "vanilla"))),
)

LATENT: tuple[Row, ...] = (
    Row("num_attention_heads", "num_heads"),
    Row("q_lora_rank", "q_lora_rank", none=0),
    Row("kv_lora_rank", "kv_lora_rank"),
    Row("qk_head_dim", "qk_nope_head_dim"),
    Row("qk_pos_emb_head_dim", "qk_rope_head_dim"),
    Row("v_head_dim", "v_head_dim"),
)

TRAIN: tuple[Row, ...] = (
    Row("seq_length", "seq_len"),
    Row("global_batch_size", "global_batch_size"),
    Row("train_iters", "steps"),
    Row("moe_z_loss_coeff", "z_loss", none=0.0),
    Row("moe_router_bias_update_rate", "balance_rate"),
    Row("mtp_loss_scaling_factor", "mtp_loss_weight"),
    Row("moe_expert_capacity_factor", "capacity_factor", none=0.0),
    Row("lr", "optimizer.learning_rate"),
    Row("min_lr", "optimizer.minimum_learning_rate"),
    Row("lr_warmup_iters", "optimizer.warmup_steps"),
    Row("adam_beta1", "optimizer.beta1"),
    Row("adam_beta2", "optimizer.beta2"),
    Row("adam_eps", "optimizer.epsilon"),
    Row("weight_decay", "optimizer.weight_decay"),
    Row("clip_grad", "optimizer.gradient_clip"),
)

STRATEGY: tuple[Row, ...] = (
    Row("pipeline_model_parallel_size", "pipeline_parallel"),
    Row("tensor_model_parallel_size", "tensor_parallel"),
    Row("context_parallel_size", "context_parallel"),
    Row("expert_model_parallel_size", "expert_parallel"),
    Row("micro_batch_size", "micro_batch_size"),
    Row("use_tp_pp_dp_mapping", "rank_order", values=(("dp-pp", False), ("pp-dp", True))),
)


def write_rows(rows: Iterable[Row], record: object) -> dict[str, Value]:
    """The arguments that say what `record` holds."""
    return {row.argument: _theirs(row, reduce(getattr, row.path.split("."), record)) for row in rows}


def read_rows(rows: Iterable[Row], arguments: Arguments) -> Tree:
    """The fields that `arguments` give; a value that is None where no row says what that means is left out."""
    tree: Tree = {}
    for row in rows:
        ours = _ours(row, arguments[row.argument])
        if ours is not None:
            put(tree, row.path, ours)
    return tree


def put(tree: Tree, path: str, value: object) -> None:
    """Set the value at a dotted path."""
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def _theirs(row: Row, ours: Any) -> Value:
    if row.none is not None and ours == row.none:
        return None
    return next((theirs for mine, theirs in row.values if mine == ours), ours)


def _ours(row: Row, theirs: Value) -> object:
    if theirs is None:
        return row.none
    return next((mine for mine, value in row.values if value == theirs), theirs)
