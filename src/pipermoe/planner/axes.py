"""The axes of the search space: every value that a strategy may have on them, before any rule is asked."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from pipermoe.resources.step import compute_slots
from pipermoe.schedule.builders import RECIPES
from pipermoe.schedule.traits import schedule_traits
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy import RECOMPUTE_MODULES
from pipermoe.specs.strategy_table import (
    DISPATCHER_NAMES,
    EXCHANGE_NAMES,
    RANK_ORDERS,
    RECOMPUTE_NAMES,
    SCHEDULE_NAMES,
    StrategyTable,
)
from pipermoe.specs.train import TrainConfig

PIPELINE_COLUMNS = ("schedule", "virtual_stages", "layer_split", "rank_order")
WAY_COLUMNS = ("dispatcher", "ranks_per_copy", "exchange")  # how tokens travel
LEVEL_COLUMNS = ("zero_dense", "zero_expert")
INSIDE_COLUMNS = (*WAY_COLUMNS, "recompute", "recompute_modules")  # what a stage does beside its shape
TAIL_COLUMNS = (*INSIDE_COLUMNS, *LEVEL_COLUMNS)
CHUNKS = (2, 4, 8)  # per rank, where a schedule takes any number
ZERO_LEVELS = ((0, 0), (1, 1), (2, 2), (3, 3), (1, 3), (3, 1))  # of dense parameters and of experts
MOST_TOKENS = 1 << 16  # of a micro-batch of several sequences


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def all_bodies(train: TrainConfig, world_size: int) -> StrategyTable:
    """Every arrangement `pp x dp x cp x tp`, folded as `pp x edp x ep x etp`, with every micro-batch size."""
    shapes = []
    for pp in divisors(world_size):
        per_stage = world_size // pp
        attention = [(cp, tp) for cp in divisors(per_stage) for tp in divisors(per_stage // cp)]
        experts = [(ep, etp) for ep in divisors(per_stage) for etp in divisors(per_stage // ep)]
        shapes += [(pp, cp, tp, ep, etp) for cp, tp in attention for ep, etp in experts]
    sizes = [
        n
        for n in divisors(train.global_batch_size)
        if n & (n - 1) == 0 and n * train.seq_len <= max(MOST_TOKENS, train.seq_len)
    ]
    pp, cp, tp, ep, etp = np.repeat(np.array(shapes), len(sizes), axis=0).T
    table = StrategyTable.product(micro_batch_size=np.tile(sizes, len(shapes)))
    return table.with_columns(
        pipeline_parallel=pp,
        data_parallel=world_size // (pp * cp * tp),
        context_parallel=cp,
        tensor_parallel=tp,
        expert_parallel=ep,
        expert_data_parallel=world_size // (pp * ep * etp),
        expert_tensor_parallel=etp,
    )


def all_pipelines(platform: Platform, world_size: int) -> StrategyTable:
    """Every schedule with its chunks per rank, the layers cut evenly (`layer_split` 0) or balanced (1), in both orders.

    Where ranks share cores there is no computing beside which an exchange could hide, so none is overlapped.
    """
    crowded = compute_slots(platform, world_size) < world_size
    rows = []
    for code, name in enumerate(SCHEDULE_NAMES):
        least, most = RECIPES[name].virtual_stages
        if crowded and schedule_traits(name, 2, least).overlaps:
            continue
        rows += [(code, chunks, cut) for chunks in ((least,) if most else CHUNKS) for cut in (0, 1)]
    table = StrategyTable.product(rank_order=range(len(RANK_ORDERS)), schedule=range(len(rows)))
    schedule, chunks, cut = np.array(rows)[table.schedule].T
    return table.with_columns(schedule=schedule, virtual_stages=chunks, layer_split=cut)


def all_tails(model: ModelSpec, platform: Platform) -> StrategyTable:
    """What is recomputed and sharded, how tokens travel and who moves their bytes."""
    recompute = [("none", 0), *(("selective", mask) for mask in _module_subsets(model)), ("full", 0)]
    ways = np.array(_ways(model, platform))
    table = StrategyTable.product(
        recompute=range(len(recompute)), exchange=range(len(ways)), zero_dense=range(len(ZERO_LEVELS))
    )
    levels = np.array(ZERO_LEVELS)[table.zero_dense]
    kinds = np.array([(RECOMPUTE_NAMES.index(name), mask) for name, mask in recompute])[table.recompute]
    return table.with_columns(
        **dict(zip(WAY_COLUMNS, ways[table.exchange].T, strict=True)),
        recompute=kinds[:, 0],
        recompute_modules=kinds[:, 1],
        zero_dense=levels[:, 0],
        zero_expert=levels[:, 1],
    )


def _ways(model: ModelSpec, platform: Platform) -> list[tuple[int, int, int]]:
    """(dispatcher, ranks per copy, exchange): every choice as a row, or a row for each rank or node that holds any.

    Exchange plans are priced from what a network is made of, so they are there where it is described by its links.
    """
    described = all(level.link for level in platform.levels)
    exchanges = [EXCHANGE_NAMES.index(name) for name in (EXCHANGE_NAMES if described else ("library",))]
    blocks = {1, *(level.ranks for level in platform.levels[:-1])} if model.moe.top_k > 1 else ()
    once = DISPATCHER_NAMES.index("deduplicated")
    plain = DISPATCHER_NAMES.index("all_to_all")
    dispatchers = [(plain, 1), *((once, block) for block in sorted(blocks))]
    return [(*dispatcher, exchange) for dispatcher in dispatchers for exchange in exchanges]


def _module_subsets(model: ModelSpec) -> list[int]:
    """The bit masks of all sets of modules that the model has and that selective recomputation can drop."""
    present = {"dense_mlp": bool(model.dense_layers), "shared_experts": model.moe.shared_width > 0}
    bits = [1 << bit for bit, module in enumerate(RECOMPUTE_MODULES) if present.get(module, True)]
    return sorted(sum(chosen) for size in range(1, len(bits) + 1) for chosen in combinations(bits, size))


def redundant_pipelines(bodies: StrategyTable, pipelines: StrategyTable, platform: Platform) -> np.ndarray:
    """(bodies, pipelines) that take as long as another and hold no less.

    Without a pipeline 1F1B is as good as any. The order of ranks matters where a stage is several runs, which do not
    fill blocks of all levels that part the ranks: of those that do, stages and runs meet on the one level that is left.
    """
    plain = np.array(
        [not schedule_traits(name, 2, RECIPES[name].virtual_stages[0]).overlaps for name in SCHEDULE_NAMES]
    )
    other = plain[pipelines.schedule] & (pipelines.schedule != SCHEDULE_NAMES.index("1f1b"))
    alone = bodies.pipeline_parallel == 1
    inside = bodies.with_columns(rank_order=np.full(len(bodies), RANK_ORDERS.index("pp-dp")))
    parting = [level.ranks for level in platform.levels[:-1] if level.ranks % int(bodies.world_size.max(initial=1))]
    alike = alone | (inside.runs_per_stage == 1) | (inside.stage_stride % max(parting, default=1) == 0)
    return alone[:, None] & other | alike[:, None] & (pipelines.rank_order == RANK_ORDERS.index("pp-dp"))


def redundant_tails(bodies: StrategyTable, tails: StrategyTable) -> np.ndarray:
    """(bodies, tails) that do as another does: sharding over one rank, exchanging with nobody."""
    alone, experts_alone = bodies.dense_replicas == 1, bodies.expert_replicas == 1
    here = bodies.expert_parallel == 1
    mixed, shards = tails.zero_dense != tails.zero_expert, tails.zero_dense > 0
    return (
        ((alone | experts_alone)[:, None] & mixed)
        | ((alone & experts_alone)[:, None] & shards)
        | (here[:, None] & ((tails.exchange > 0) | (tails.dispatcher > 0)))
    )
