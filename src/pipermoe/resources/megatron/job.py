"""MegatronJob: a model, a strategy, and the choices that change Megatron's memory but no other program knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipermoe.resources.megatron.layout import StageLayout
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy

AttentionCore = Literal["flash", "cudnn", "unfused"]
CrossEntropy = Literal["unfused", "native", "te"]
Dispatcher = Literal["allgather", "alltoall", "flex"]


@dataclass(frozen=True, slots=True)
class Options:
    """Megatron's own choices, after the names of its arguments."""

    learned_positions: int = 0
    rotary_tables: int = 0  # tables of angles, cosines and sines that a rotary embedding keeps; 0: no rotation
    rope_fusion: bool = True
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    optimizer_instances: int = 1
    gradient_accumulation_fusion: bool = True
    attention_core: AttentionCore = "flash"
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    cross_entropy: CrossEntropy = "unfused"
    predicted_logits_stay: bool = False  # a prediction module's logits, through the loss of the model
    moe_dispatcher: Dispatcher = "allgather"
    moe_permute_fusion: bool = False
    index_add: bool = False  # returned rows are summed by `index_add`, which keeps them
    grouped_gemm: bool = False
    swiglu_fusion: bool = True
    attention_mask: bool = True  # the data loader makes a mask of s x s booleans for every sequence
    main_gradient_bytes: int = 4
    main_weight_bytes: int = 4
    moment_bytes: int = 8  # both together
    capacity_factor: float = 0.0  # above 0: every expert gets rows padded to this share of the balanced ones
    recompute: frozenset[str] = frozenset()  # modules of selective recomputation
    recomputed_layers: int = 0  # of each stage, from its first: layers that keep their input only


@dataclass(frozen=True, slots=True)
class Machine:
    """What the GPU and its libraries keep: every term that no argument of Megatron decides.

    `te_workspace`: TransformerEngine's buffer for one cuBLAS stream, 32 MiB from compute capability 9.0, else 4 MiB
    (cpp_extensions/gemm.py); grouped GEMMs run on four more streams. `cublas_workspace`: PyTorch's buffer for a thread
    that calls cuBLAS: CUBLAS_WORKSPACE_CONFIG, else 32 MiB on Hopper and later, 8.125 MiB before; the main and the
    autograd thread have one each (aten/src/ATen/cuda/CublasHandlePool.cpp). `runtime_slack`: small persistent tensors
    that are not listed (random states, counters, loss values, rounding of the allocator to 512 bytes).
    """

    te_workspace: int = 32 * 2**20 + 1024
    te_grouped_streams: int = 4
    cublas_workspace: int = 32 * 2**20
    cublas_threads: int = 2
    runtime_slack: int = 1_600_000

    @classmethod
    def of(cls, compute_capability: int, cublas_workspace: int | None = None) -> Machine:
        """The buffers of a GPU generation: 8 Ampere, 9 Hopper, 10 Blackwell."""
        if compute_capability >= 9:
            return cls(cublas_workspace=cublas_workspace or 32 * 2**20)
        return cls(te_workspace=4 * 2**20, cublas_workspace=cublas_workspace or 8_519_680)


@dataclass(frozen=True, slots=True)
class MegatronJob:
    """One training job as Megatron runs it; `model.vocab_size` is padded as Megatron pads it.

    `routing_imbalance`: rows that this rank's experts receive, relative to balanced routing.
    """

    model: ModelSpec
    strategy: Strategy
    seq_len: int
    global_batch_size: int
    stages: tuple[StageLayout, ...]
    options: Options
    routing_imbalance: float = 1.0

    @property
    def microbatches(self) -> int:
        return self.strategy.microbatches(self.global_batch_size)

    @property
    def tokens(self) -> int:
        """T: tokens that attention sees on this rank, all of them on every tensor-parallel rank."""
        return self.seq_len // self.strategy.context_parallel * self.strategy.micro_batch_size

    @property
    def shard(self) -> int:
        """Tokens of the residual stream on this rank: T / tp with sequence parallelism."""
        return self.tokens // (self.strategy.tensor_parallel if self.options.sequence_parallel else 1)

    @property
    def expert_group_tokens(self) -> int:
        """Tokens of all ranks that share the experts: of ep x etp residual shards."""
        return self.shard * self.strategy.expert_parallel * self.strategy.expert_tensor_parallel

    @property
    def sent_rows(self) -> float:
        """Rows that leave this rank: each of its tokens k times; or what fills every expert's capacity."""
        moe, factor = self.model.moe, self.options.capacity_factor
        if factor:
            return math.ceil(self.shard * moe.top_k / moe.num_experts * factor) * moe.num_experts
        return self.shard * moe.top_k

    @property
    def rows(self) -> float:
        """Rows that reach the experts of this rank: as many as leave, from every expert-tensor-parallel rank."""
        imbalance = 1.0 if self.options.capacity_factor else self.routing_imbalance
        return self.sent_rows * self.strategy.expert_tensor_parallel * imbalance

    @property
    def local_experts(self) -> int:
        return self.model.moe.num_experts // self.strategy.expert_parallel

    def recomputes(self, module: str) -> bool:
        return module in self.options.recompute
