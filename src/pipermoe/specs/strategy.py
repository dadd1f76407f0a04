"""Strategy: how ranks are arranged, what is sharded, what is recomputed. One of the four decisions."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipermoe.specs.base import Frozen

Recompute = Literal["none", "selective", "full"]
# How tokens travel to their experts: every choice as a row of its own, or one row per token and rank, or node, that
# holds any.
Dispatcher = Literal["all_to_all", "deduplicated"]
# Who moves an all-to-all's bytes: the communication library's collective, or exchange plans that know the network.
Exchange = Literal["library", "planned"]
# Which of the two outermost axes is the inner one, as Megatron's orders tp-cp-ep-dp-pp and tp-cp-ep-pp-dp end:
# stages far apart and replicas near each other, or the stages of a pipeline near and replicas far (specs/mesh.py).
RankOrder = Literal["dp-pp", "pp-dp"]

# What selective recomputation drops after the forward and rebuilds once in the backward. A module is rebuilt up to the
# input of its last product: what backward does not read is not computed again. Collectives are never repeated.
RecomputeModule = Literal["norm", "attention", "moe_act", "experts", "shared_experts", "dense_mlp"]
RECOMPUTE_MODULES: tuple[RecomputeModule, ...] = (
    "norm",  # both normalised inputs of a layer, from the residual stream
    "attention",  # queries, keys, values and the core's output, from the normalised input
    "moe_act",  # the routed experts' activation product, from their gate and up product
    "experts",  # the routed experts' gate and up product and its activation, from the rows that arrived
    "shared_experts",  # the same of the shared experts, from the normalised input
    "dense_mlp",  # the same of a dense layer's MLP
)


# Schedules of `schedule.builders`, which this package stands below, that run from both ends of the pipeline: position r
# and the one as far from the other end hold the same stages.
MIRRORED = frozenset({"dualpipe"})


class Strategy(Frozen):
    """Two arrangements of the same ranks (parallel folding).

    Attention is spread over `pp x dp x cp x tp`, experts over `pp x edp x ep x etp`.
    The paper's expert-data parallel mesh is `cp = tp = etp = edp = 1`, `ep = dp`.
    `layer_split` gives the layers of each of the `pipeline_parallel * virtual_stages` stages; empty: as even as can be.
    Deduplicated dispatch sends a token once to every `ranks_per_copy` consecutive ranks of an expert group, which pass
    the copy on among themselves: 1 each rank for itself, more the ranks of a node.
    `zero_dense` and `zero_expert` are ZeRO levels over `dense_replicas` and `expert_replicas`: 1 shards optimizer
    state, 2 also gradients, 3 also weights. `recompute_modules` are those of "selective" recomputation, in the order of
    `RECOMPUTE_MODULES`.
    """

    pipeline_parallel: PositiveInt = 1
    virtual_stages: PositiveInt = 1
    data_parallel: PositiveInt = 1
    context_parallel: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    expert_data_parallel: PositiveInt = 1
    expert_tensor_parallel: PositiveInt = 1
    micro_batch_size: PositiveInt = 1
    rank_order: RankOrder = "dp-pp"
    schedule: str = "1f1b"
    dispatcher: Dispatcher = "all_to_all"
    ranks_per_copy: PositiveInt = 1
    exchange: Exchange = "library"
    layer_split: tuple[PositiveInt, ...] = ()
    recompute: Recompute = "none"
    recompute_modules: tuple[RecomputeModule, ...] = ()
    zero_dense: int = Field(default=0, ge=0, le=3)
    zero_expert: int = Field(default=0, ge=0, le=3)

    @model_validator(mode="after")
    def _folds(self) -> Strategy:
        dense = self.data_parallel * self.context_parallel * self.tensor_parallel
        expert = self.expert_data_parallel * self.expert_parallel * self.expert_tensor_parallel
        if dense != expert:
            raise ValueError(
                f"data_parallel * context_parallel * tensor_parallel = {dense} must equal "
                f"expert_data_parallel * expert_parallel * expert_tensor_parallel = {expert}"
            )
        if (self.recompute == "selective") != bool(self.recompute_modules):
            raise ValueError(
                f"recompute = {self.recompute} with recompute_modules = {list(self.recompute_modules)}: selective "
                f"names its modules ({', '.join(RECOMPUTE_MODULES)}), none and full have no modules"
            )
        if self.ranks_per_copy > 1 and self.dispatcher != "deduplicated":
            raise ValueError(
                f"ranks_per_copy = {self.ranks_per_copy} needs dispatcher = deduplicated; {self.dispatcher} sends "
                "every choice by itself"
            )
        return self

    @field_validator("recompute_modules")
    @classmethod
    def _in_order(cls, modules: tuple[RecomputeModule, ...]) -> tuple[RecomputeModule, ...]:
        return tuple(module for module in RECOMPUTE_MODULES if module in modules)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline_parallel * self.ranks_per_stage

    @property
    def ranks_per_stage(self) -> int:
        return self.data_parallel * self.context_parallel * self.tensor_parallel

    @property
    def stage_stride(self) -> int:
        """How many ranks a stage lies behind the one before. In the order "pp-dp": the fewest that hold whole groups
        of tp, cp, etp and ep.
        """
        inner = math.lcm(
            self.context_parallel * self.tensor_parallel, self.expert_parallel * self.expert_tensor_parallel
        )
        return inner if self.rank_order == "pp-dp" else self.ranks_per_stage

    @property
    def num_stages(self) -> int:
        """Model chunks in the whole pipeline."""
        return self.pipeline_parallel * self.virtual_stages

    @property
    def stage_homes(self) -> int:
        """Pipeline ranks that hold every stage, each for its share of the micro-batches."""
        return 1 + (self.schedule in MIRRORED)

    @property
    def dense_replicas(self) -> int:
        """Ranks over which the same dense parameters are reduced and sharded; those of one sequence are among them."""
        return self.data_parallel * self.context_parallel * self.stage_homes

    @property
    def expert_replicas(self) -> int:
        """Ranks over which the same routed experts are reduced and sharded."""
        return self.expert_data_parallel * self.stage_homes

    def microbatches(self, global_batch_size: int) -> int:
        """Micro-batches that one data-parallel rank runs in a step (M); rounded down where they do not divide."""
        return global_batch_size // (self.data_parallel * self.micro_batch_size)

    def stage_microbatches(self, global_batch_size: int) -> int:
        """Of these, how many a rank takes through each stage that it holds."""
        return self.microbatches(global_batch_size) // self.stage_homes

    @property
    def sharding_levels(self) -> set[int]:
        """The ZeRO levels in effect: over one replica no level shards anything."""
        levels = {self.zero_dense} if self.dense_replicas > 1 else set()
        return levels | ({self.zero_expert} if self.expert_replicas > 1 else set())

    @staticmethod
    def parse(text: str) -> Strategy:
        """The strategy that a line such as `pp2 dp2 ep2 mbs4 1f1b z1` says (specs/strategy_text.py). UserError."""
        from pipermoe.specs.strategy_text import parse_strategy  # it builds on this module

        return parse_strategy(text)

    def compact(self) -> str:
        """Degrees and ZeRO level for tables: `pp2 dp2 ep2 z1`; degrees of one are left out, except pp, dp and ep."""
        from pipermoe.specs.strategy_text import layout_text

        return layout_text(self)
