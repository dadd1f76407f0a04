"""The sizes that activations are made of, and the shape of the answer. All results are bytes for one micro-batch.

T tokens whose attention a rank computes, X tokens of its residual stream (T / tp: sequence parallelism, Korthikanti et
al., arXiv 2205.05198), K choices a token, A = X * K rows that leave the rank, R rows that arrive, D = X * hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipermoe.resources.activations.ledger import BY_BIRTH, Amount
from pipermoe.resources.dispatch import kept_rows, skewed_copies
from pipermoe.resources.kinds import distinct
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy_table import DISPATCHER_NAMES, RECOMPUTE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

STATISTIC_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What a framework does with memory beyond the tensors of the model; the defaults are this project's runtime.

    `materialised_attention` keeps the probabilities of the attention core instead of its log-sum-exp, as torch does
    where no fused kernel takes the operands.
    The head works on `loss_chunks` slices of the tokens in turn; `logits_bytes` is the element in which logits are kept
    (0: fp32, in which the loss is computed). What allocators and communication libraries
    hold beside tensors is the machine's: `Platform.reserved_bytes`.
    """

    materialised_attention: bool = False
    loss_chunks: int = 1
    logits_bytes: int = 0


RUNTIME = MemoryProfile()


@dataclass(frozen=True)
class Sizes:
    """One micro-batch on one rank; every field but the specification broadcasts over strategies.

    `imbalance` is the rows of the busiest rank over the mean. With a `capacity_factor` above 0 an expert takes at most
    so many times its even share; nothing is padded to it. Bytes are told as `nothing` is: by birth, or in all.
    """

    model: ModelSpec
    element: int
    tokens: Any
    seq_len: int = 1
    cp: Any = 1
    tp: Any = 1
    ep: Any = 1
    etp: Any = 1
    imbalance: Any = 1.0
    capacity_factor: float = 0.0
    profile: MemoryProfile = RUNTIME
    deduplicated: Any = False
    ranks_per_copy: Any = 1
    nothing: Amount = BY_BIRTH

    @cached_property
    def stream(self) -> Any:
        return self.tokens // self.tp

    @cached_property
    def hidden(self) -> Any:
        return self.stream * self.model.hidden_size * self.element

    @cached_property
    def exact_hidden(self) -> Any:
        """The residual stream in fp32, in which norms work."""
        return self.stream * self.model.hidden_size * STATISTIC_BYTES

    @cached_property
    def rows(self) -> Any:
        """Rows that leave this rank's tokens for experts."""
        return self.stream * self.model.moe.top_k

    @cached_property
    def leaving(self) -> Any:
        """Rows that this rank's tokens send once capacities have cut them, from a rank with balanced choices."""
        return kept_rows(self.rows, self.model.moe.num_experts, self.capacity_factor)

    @cached_property
    def arriving(self) -> Any:
        """Rows that this rank's experts compute; the ranks of an expert tensor group compute the same ones."""
        return np.ceil(self.rows * self.etp * self._within_capacity(self.imbalance))

    @property
    def chosen_elsewhere(self) -> Any:
        """Rows that a plain dispatch sends to other ranks.

        All ranks choose alike: of its own rows the busiest rank keeps as many as each of the others sends it.
        """
        return self.leaving * (self.ep - 1) // self.ep - self._excess

    @property
    def chosen_from_elsewhere(self) -> Any:
        """Rows that the combine after it sends back."""
        return self.leaving * (self.ep - 1) // self.ep + (self.ep - 1) * self._excess

    @property
    def _excess(self) -> Any:
        """Rows that every rank sends the busiest one beyond an even share."""
        return np.rint((self.computed - self.leaving) / self.ep).astype(np.int64)

    @property
    def computed(self) -> Any:
        """Rows of whole experts that this rank computes; `etp` ranks that share them have as many `arriving` each."""
        return np.rint(self.leaving * self._within_capacity(self.imbalance) / self._within_capacity(1)).astype(np.int64)

    def _within_capacity(self, share: Any) -> Any:
        """At most `capacity_factor` times the even share: what the busiest rank has when all its experts are full."""
        return np.minimum(share, self.capacity_factor) if self.capacity_factor else share

    @cached_property
    def copies(self) -> Any:
        """Copies of tokens that a deduplicated dispatch sends to ranks, the sender itself included."""
        return self._copies(1, 1)

    @cached_property
    def arriving_copies(self) -> Any:
        """Copies that the rank receives which receives most, its own included."""
        return self._copies(1, 0)

    @cached_property
    def crossing(self) -> Any:
        """Copies that it sends to nodes before, the sender's own included; 0 where a node is a rank."""
        return self._copies(self.ranks_per_copy, 1) * (np.asarray(self.ranks_per_copy) > 1)

    def _copies(self, ranks_per_copy: Any, over: int) -> Any:
        """The most of any rank: summed `over` sources (0) or destinations (1)."""
        moe, limits = self.model.moe, (self.capacity_factor, self.imbalance)
        each = np.broadcast_arrays(self.deduplicated, self.rows, self.ep, ranks_per_copy)
        kinds = distinct([np.ravel(column).astype(np.int64) for column in each])
        found = [
            skewed_copies(int(rows), moe.top_k, moe.num_experts, int(ep), *limits, int(block)).sum(over).max()
            if deduplicated and ep > 1
            else 0
            for deduplicated, rows, ep, block in zip(*(column.ravel()[kinds.rows] for column in each), strict=True)
        ]
        return np.array(found)[kinds.of].reshape(each[0].shape)

    @cached_property
    def local_experts(self) -> Any:
        return self.model.moe.num_experts // self.ep

    def stream_by(self, width: Any) -> Any:
        return self.stream * width * self.element

    def tokens_by(self, width: Any) -> Any:
        """A tensor that tensor parallelism divides by its `width`."""
        return self.tokens * width * self.element / self.tp

    def arriving_by(self, width: Any) -> Any:
        return self.arriving * width * self.element


def sizes_of(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    profile: MemoryProfile = RUNTIME,
    imbalance: Any = 1.0,
    nothing: Amount = BY_BIRTH,
) -> Sizes:
    """The sizes of every row of a table."""
    return Sizes(
        model,
        train.recipe.activation,
        table.micro_batch_size * train.seq_len // table.context_parallel,
        train.seq_len,
        table.context_parallel,
        table.tensor_parallel,
        table.expert_parallel,
        table.expert_tensor_parallel,
        imbalance,
        train.capacity_factor,
        profile,
        table.dispatcher == DISPATCHER_NAMES.index("deduplicated"),
        table.ranks_per_copy,
        nothing,
    )


def product_bytes(sizes: Sizes, *matrices: Any) -> Any:
    """The largest product of a weight gradient on its way into an fp32 sum, where it is of another format.

    `matrices` are elements of weights; fp32 products are added where they are made.
    """
    return np.maximum.reduce(np.broadcast_arrays(*matrices)) * sizes.element * (sizes.element < STATISTIC_BYTES)


@dataclass(frozen=True, slots=True)
class Recompute:
    """Masks over strategies: what is dropped after the forward (`specs.strategy.RECOMPUTE_MODULES`)."""

    full: Any = False
    norm: Any = False
    attention: Any = False
    moe_act: Any = False
    experts: Any = False
    shared_experts: Any = False
    dense_mlp: Any = False

    @classmethod
    def of(cls, table: StrategyTable) -> Recompute:
        return cls(
            table.recompute == RECOMPUTE_NAMES.index("full"),
            table.rebuilds("norm"),
            table.rebuilds("attention"),
            table.rebuilds("moe_act"),
            table.rebuilds("experts"),
            table.rebuilds("shared_experts"),
            table.rebuilds("dense_mlp"),
        )
