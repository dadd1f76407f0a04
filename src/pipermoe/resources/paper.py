"""The equations of the Piper paper as it prints them (arXiv 2605.05049), for comparison; nothing plans with them.

Where the model of this package differs, and why: docs/paper.md. All arguments broadcast; bytes and seconds.

Symbols: b `batch` (sequences), s `seq_len`, d `hidden_size`, H `num_heads`, E `num_experts`, k `top_k`, d_ffn
`expert_width`, L `num_layers`, EP `expert_parallel`, PP `pipeline_parallel`, M `microbatches`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

STATE_BYTES = 16  # of a parameter: fp16 weight 2 and gradient 2, fp32 master weight 4 and two moments 8
ELEMENT_BYTES = 2


class Shape(NamedTuple):
    """The sizes of a model that the equations use: every layer is attention and E experts of three matrices."""

    num_layers: Any
    hidden_size: Any
    num_heads: Any
    num_experts: Any
    top_k: Any
    expert_width: Any


def attention_state_bytes(hidden_size: Any) -> Any:
    """64 d^2: state of one layer's four d x d projections."""
    return STATE_BYTES * 4 * hidden_size**2


def expert_state_bytes(hidden_size: Any, expert_width: Any, num_experts: Any) -> Any:
    """48 E d d_ffn: state of `num_experts` experts of three d x d_ffn matrices."""
    return STATE_BYTES * 3 * num_experts * hidden_size * expert_width


def attention_activation_bytes(batch: Any, seq_len: Any, hidden_size: Any, num_heads: Any) -> Any:
    """12 b s d + 4 b H s^2: one layer's attention, its s x s scores materialised."""
    return 12 * batch * seq_len * hidden_size + 4 * batch * num_heads * seq_len**2


def expert_activation_bytes(batch: Any, seq_len: Any, top_k: Any, hidden_size: Any, expert_width: Any) -> Any:
    """2 b s k (3 d_ffn + d): one layer's routed rows, their input and three products of width d_ffn."""
    return ELEMENT_BYTES * batch * seq_len * top_k * (3 * expert_width + hidden_size)


def unsharded_bytes(shape: Shape, batch: Any, seq_len: Any) -> Any:
    """M_unsharded: states and activations of the whole model on one device."""
    return expert_data_parallel_bytes(shape, batch, seq_len, expert_parallel=1)


def expert_data_parallel_bytes(shape: Shape, batch: Any, seq_len: Any, expert_parallel: Any) -> Any:
    """M_edp: experts and their rows divided by EP, attention repeated on every rank."""
    return shape.num_layers * (
        layer_state_bytes(shape, expert_parallel) + layer_activation_bytes(shape, batch, seq_len, expert_parallel)
    )


def one_f_one_b_bytes(
    shape: Shape, batch: Any, seq_len: Any, expert_parallel: Any, pipeline_parallel: Any, microbatches: Any, stage: Any
) -> Any:
    """M_1F1B(i) of `stage` i (0-based): L / PP layers, with PP - i micro-batches of b / M sequences in flight."""
    activations = layer_activation_bytes(shape, batch / microbatches, seq_len, expert_parallel)
    in_flight = pipeline_parallel - stage
    return (shape.num_layers / pipeline_parallel) * (
        layer_state_bytes(shape, expert_parallel) + in_flight * activations
    )


def first_to_last_difference_bytes(
    shape: Shape, batch: Any, seq_len: Any, expert_parallel: Any, pipeline_parallel: Any, microbatches: Any
) -> Any:
    """Delta M = M_1F1B(0) - M_1F1B(PP - 1): L (PP - 1) / PP times a layer's activations of one micro-batch."""
    activations = layer_activation_bytes(shape, batch / microbatches, seq_len, expert_parallel)
    return shape.num_layers * (pipeline_parallel - 1) / pipeline_parallel * activations


def layer_state_bytes(shape: Shape, expert_parallel: Any) -> Any:
    """64 d^2 + (48 E / EP) d d_ffn."""
    local_experts = shape.num_experts / expert_parallel
    return attention_state_bytes(shape.hidden_size) + expert_state_bytes(
        shape.hidden_size, shape.expert_width, local_experts
    )


def layer_activation_bytes(shape: Shape, batch: Any, seq_len: Any, expert_parallel: Any) -> Any:
    """12 b s d + 4 b H s^2 + (2 b s k / EP) (3 d_ffn + d); b counts twice differently here, see docs/paper.md."""
    experts = expert_activation_bytes(batch, seq_len, shape.top_k, shape.hidden_size, shape.expert_width)
    return attention_activation_bytes(batch, seq_len, shape.hidden_size, shape.num_heads) + experts / expert_parallel


def all_to_all_seconds(
    batch: Any, seq_len: Any, top_k: Any, hidden_size: Any, expert_parallel: Any, nic_bytes_per_s: Any
) -> Any:
    """T_a2a >= 4 b s k d / (EP B_NIC): dispatch and combine of one layer's forward, two bytes an element."""
    return 2 * ELEMENT_BYTES * batch * seq_len * top_k * hidden_size / (expert_parallel * nic_bytes_per_s)


def migration_bytes(num_experts: Any, hidden_size: Any, expert_width: Any, gpus: Any = 8) -> Any:
    """48 E d d_ffn / G: what each of G GPUs sends when every expert of a layer moves (section VI-A, Table IV)."""
    return expert_state_bytes(hidden_size, expert_width, num_experts) / gpus
