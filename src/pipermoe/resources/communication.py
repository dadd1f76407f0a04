"""Which collectives a rank calls in one step, with how many bytes, and how long they take.

Bytes are counted as `specs.report.Traffic` defines them, the keys are its "collective.axis". Every figure is an array
(rows, stages): a row per strategy, a column per pipeline stage; all ranks of a stage are alike under balanced routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.exchange.regular import planned_seconds
from pipermoe.resources.activations.sizes import Sizes
from pipermoe.resources.dispatch import Hops, expected_hops, planned_hops
from pipermoe.resources.kinds import distinct
from pipermoe.resources.rates import collective_seconds, level_send_seconds
from pipermoe.resources.shared_cores import carried_share, meeting_work
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import StateElements
from pipermoe.schedule.traits import ways
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.network import Collective
from pipermoe.specs.platform import Platform
from pipermoe.specs.spread import Axis, spread
from pipermoe.specs.strategy_table import EXCHANGE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

StagesOf = Sequence[Sequence[int]]  # of every pipeline rank, the stages that it holds
COUNT_BYTES = 8  # routing counts travel as int64
SLOT_BYTES = 8  # of a choice under deduplicated dispatch: its copy and the bits of its weight, int32
TOTALS_BYTES = 48  # squared gradient norm, four losses and the dropped share, float64, agreed on by all ranks


@dataclass(frozen=True, slots=True)
class Call:
    """Calls of one collective over one axis per rank and step, and the bytes of all of them together."""

    collective: Collective
    axis: Axis
    calls: Any
    bytes: Any
    counts: bool = False  # the exchange of routing counts, reported apart
    joined: Any = 0  # of the calls, those that come right after another of the same ranks, without computing between

    @property
    def key(self) -> str:
        return f"{self.collective}{'_counts' if self.counts else ''}.{self.axis}"


@dataclass(frozen=True, slots=True)
class Exchanges:
    """The collectives inside a stage of one micro-batch, forward and backward, in calls of all its layers."""

    forward: tuple[Call, ...]
    backward: tuple[Call, ...]


def exchanges(sizes: Sizes, shapes: StageShapes, ep_rank: int | None = None) -> Exchanges:
    """All collectives of a stage's layers: arrays (rows, stages). Recomputation repeats none of them.

    Deduplicated dispatch sends what choices `skewed` towards `ep_rank` of the expert group lead to; None: on average.
    """
    pairs = [
        _all_to_all(sizes, shapes, ep_rank),
        _tensor_parallel(sizes, shapes),
        _context_parallel(sizes, shapes),
        _expert_tensor_parallel(sizes, shapes),
    ]
    return Exchanges(*(tuple(call for pair in pairs for call in pair[side]) for side in (0, 1)))


def _column(value: Any) -> Any:
    return np.asarray(value)[..., None]


def _all_to_all(sizes: Sizes, shapes: StageShapes, ep_rank: int | None) -> tuple[list[Call], list[Call]]:
    """Dispatch and combine, and the counts before; the backward exchanges as much, without counts.

    Plain (Piper, arXiv 2605.05049, section 1.4 of its review): b*s*k/EP tokens to every other rank, and back; of the
    busiest rank under an imbalance. Deduplicated (`_hops`): a copy per token and rank, one sum back; with each choice
    its copy and weight (8 bytes) go forward, the weight's gradient comes backward, and the counts of every rank have
    that of copies behind them. By node: the same inside nodes; before it a copy per token and node crosses with all its
    choices, and their gradients come back.
    """
    ep, block, model, element = _column(sizes.ep), _column(sizes.ranks_per_copy), sizes.model, sizes.element
    local_experts, width = model.moe.num_experts // ep, model.hidden_size * element
    chosen, returning = _column(sizes.chosen_elsewhere), _column(sizes.chosen_from_elsewhere)
    layers = shapes.routed_layers * (ep > 1)
    deduplicated, hops = _column(sizes.deduplicated), _hops(sizes, ep_rank)
    by_node = block > 1
    crossing = (hops.copies_out + hops.copies_in) * width
    rows = np.where(deduplicated, crossing, (chosen + returning) * width)
    told = np.where(by_node, block * local_experts + block + 1, local_experts + deduplicated)
    counts = Call("all_to_all", "ep", layers, layers * (ep - 1) * told * COUNT_BYTES, counts=True, joined=layers)
    calls, direct = 2 + deduplicated, layers * ~by_node
    sent, returned = rows + deduplicated * chosen * SLOT_BYTES, rows + deduplicated * returning * element
    forward = [Call("all_to_all", "ep", direct * calls, direct * sent, joined=direct * deduplicated), counts]
    backward = [Call("all_to_all", "ep", direct * calls, direct * returned, joined=direct * deduplicated)]
    if by_node.any():
        hopping, choices = layers * by_node, model.moe.top_k
        passing = (hops.inside_out + hops.inside_in) * width
        for side, across, inside in (
            (forward, hops.copies_out * choices * SLOT_BYTES, hops.rows_out * SLOT_BYTES),
            (backward, hops.copies_in * choices * element, hops.rows_in * element),
        ):
            side.append(Call("all_to_all", "ep_across", hopping * calls, hopping * (crossing + across)))
            side.append(Call("all_to_all", "ep_inside", hopping * calls, hopping * (passing + inside)))
    return forward, backward


def _hops(sizes: Sizes, ep_rank: int | None) -> Hops:
    """What deduplicated dispatch sends on its way: columns (rows, 1), 0 where dispatch is plain.

    Exactly that of planned choices, skewed towards `ep_rank`; without one what independent choices lead to.
    """
    moe, of = sizes.model.moe, expected_hops if ep_rank is None else partial(planned_hops, busiest=ep_rank)
    each = np.broadcast_arrays(sizes.deduplicated, sizes.rows, sizes.ep, sizes.ranks_per_copy)
    kinds = distinct([np.ravel(column).astype(np.int64) for column in each])
    found = []
    for deduplicated, rows, ep, block in zip(*(np.ravel(column)[kinds.rows] for column in each), strict=True):
        if not deduplicated or ep == 1:
            found.append([0] * len(fields(Hops)))
            continue
        widths = (int(rows), moe.top_k, moe.num_experts, int(ep), int(block))
        hops = of(*widths, sizes.capacity_factor, sizes.imbalance)
        found.append([np.ravel(getattr(hops, field.name))[ep_rank or 0] for field in fields(Hops)])
    return Hops(*np.array(found)[kinds.of].T[..., None])


def _tensor_parallel(sizes: Sizes, shapes: StageShapes) -> tuple[list[Call], list[Call]]:
    """Every block of column- and row-parallel products gathers its input over the sequence and scatters its output.

    Sequence parallelism: Korthikanti et al., arXiv 2205.05198, section 4.2.2: one all-gather and one reduce-scatter a
    block; backward mirrors them and gathers the input once more for the weight gradient.
    """
    tp, shared = _column(sizes.tp), sizes.model.moe.shared_width > 0
    heads = shapes.has_head + shapes.predictions
    blocks = 2 * shapes.dense_layers + (1 + shared) * shapes.routed_layers + heads + shapes.predictions  # and its join
    blocks = blocks * (tp > 1)
    scattered = blocks - heads * (tp > 1)  # the head's output stays divided over the vocabulary
    moved = _column(sizes.tokens) * sizes.model.hidden_size * sizes.element
    forward = [
        Call("all_gather", "tp", blocks, blocks * moved),
        Call("reduce_scatter", "tp", scattered, scattered * moved),
    ]
    gathered = scattered + blocks
    backward = [
        Call("all_gather", "tp", gathered, gathered * moved),
        Call("reduce_scatter", "tp", blocks, blocks * moved),
    ]
    return forward, backward


def _context_parallel(sizes: Sizes, shapes: StageShapes) -> tuple[list[Call], list[Call]]:
    """Every rank gathers the keys and values of all ranks' tokens and computes its own queries (Llama 3, arXiv
    2407.21783, section 3.3.2); backward gathers them again and scatters their gradients.
    """
    cp, attention = _column(sizes.cp), sizes.model.attention
    width = attention.num_kv_heads * (attention.query_key_dim + attention.value_dim) / _column(sizes.tp)
    layers = (shapes.routed_layers + shapes.dense_layers) * (cp > 1)
    moved = _column(sizes.tokens) * cp * width * sizes.element
    gather = Call("all_gather", "cp", layers, layers * moved)
    return [gather], [gather, Call("reduce_scatter", "cp", layers, layers * moved)]


def _expert_tensor_parallel(sizes: Sizes, shapes: StageShapes) -> tuple[list[Call], list[Call]]:
    """Rows that arrived on one rank are gathered over etp before the experts, partial sums scattered after them."""
    etp = _column(sizes.etp)
    layers = shapes.routed_layers * (etp > 1)
    moved = _column(sizes.arriving) * sizes.model.hidden_size * sizes.element
    both = [
        Call("all_gather", "etp", layers, layers * moved),
        Call("reduce_scatter", "etp", layers, layers * moved),
    ]
    return both, both


@dataclass(frozen=True, slots=True)
class ExchangeSeconds:
    """Seconds of one micro-batch's collectives, forward and backward: arrays (rows, stages).

    Those of links pass while the rank waits; the `carried` ones are work of the cores that its host's ranks share.
    """

    forward: Any
    backward: Any
    forward_carried: Any
    backward_carried: Any


def exchange_seconds(platform: Platform, found: Exchanges, table: StrategyTable) -> ExchangeSeconds:
    """Seconds of one micro-batch's collectives in the forward and in the backward direction, per stage.

    All-to-alls go by the library's collective or by the cheapest exchange plan, as the strategy says.
    """
    planned = (table.exchange == EXCHANGE_NAMES.index("planned"))[:, None]
    columns = _as_columns(table)

    def seconds(call: Call) -> tuple[Any, Any]:
        group = spread(columns, call.axis)
        lasted = collective_seconds(platform, call.collective, group, call.bytes, call.calls)
        if call.collective == "all_to_all" and planned.any():
            plan = planned_seconds(platform, group.ranks, group.span, call.bytes, call.calls)
            lasted = np.where(planned, plan, lasted)
        if platform.host.rank_share == 1:
            return lasted, 0.0 * lasted
        carried = carried_share(platform, group)
        met = (call.calls - call.joined) * meeting_work(platform, group.ranks)
        return np.where(carried > 0, 0.0, lasted), carried * lasted + met

    def total(calls: tuple[Call, ...]) -> tuple[Any, Any]:
        linked, carried = zip(*map(seconds, calls), strict=True)
        return sum(linked), sum(carried)

    (forward, forward_carried), (backward, backward_carried) = total(found.forward), total(found.backward)
    return ExchangeSeconds(forward, backward, forward_carried, backward_carried)


def message_bytes(sizes: Sizes) -> Any:
    """Bytes of one micro-batch's activations, or of their gradient, between two stages: (rows,)."""
    return sizes.hidden


def send_seconds(platform: Platform, table: StrategyTable, sent_bytes: Any, stages_of: StagesOf) -> Any:
    """Seconds of one message from each stage to the next: (rows, stages - 1), one column at least.

    A message between two stages of one rank takes no time.
    """
    levels = [level.ranks for level in platform.levels]
    hops = hop_levels(levels, table.stage_stride, table.runs_per_stage, stages_of)
    seconds = np.zeros(hops.shape)
    for index in range(len(platform.levels)):
        seconds += np.where(hops == index, level_send_seconds(platform, index, np.asarray(sent_bytes)[:, None]), 0.0)
    return seconds


def arrival_work(platform: Platform, table: StrategyTable, stages_of: StagesOf) -> Any:
    """Seconds of a core that a rank spends on each message from a neighbouring stage: (rows, stages - 1), as sends.

    A message is a meeting of two, paid by the one who waits for it.
    """
    home = {stage: rank for rank, stages in enumerate(stages_of) for stage in stages}
    leaves = np.array([home[stage] != home[stage + 1] for stage in range(len(home) - 1)] or [False])
    return np.where(leaves, meeting_work(platform, 2), np.zeros((len(table), 1)))


def hop_levels(levels: Sequence[int], stride: Any, runs: Any, stages_of: StagesOf) -> NDArray[np.int64]:
    """The level of the network between each stage and the next, -1 on one rank: (rows, stages - 1), a column at least.

    Stages lie `stride` (rows,) ranks apart; of `runs` (rows,) pipelines behind each other, and of the two ways where
    stages have two homes, that one counts whose stages are farthest. `levels[i]` ranks meet on level i.
    """
    hops = np.array([list(pairwise(way)) or [(0, 0)] for way in ways(stages_of)])  # (ways, stages - 1, 2)
    low, high = hops.min(axis=2), hops.max(axis=2)
    stride, several = np.asarray(stride)[:, None, None], np.asarray(runs)[:, None, None] > 1
    pipeline = stride * len(stages_of)
    first, last = low * stride, (high + 1) * stride - 1
    outermost = len(levels) - 1
    level = np.full(first.shape, outermost)
    for index in reversed(range(outermost)):
        # Where pipelines begin at any multiple of their length, what they have in common with a block counts.
        size = np.where(several, np.gcd(levels[index], pipeline), levels[index])
        level = np.where(first // size == last // size, index, level)
    return np.where(high > low, level, -1).max(axis=1)


def sync_calls(
    train: TrainConfig, shapes: StageShapes, table: StrategyTable, states: StateElements
) -> tuple[list[Call], list[Call]]:
    """Collectives on flat buffers: those that reduce gradients, and those that gather weights. None in a group of one.

    Every unit (layer, embedding, head) has its own. ZeRO-0: an all-reduce. ZeRO-1: a reduce-scatter, and an all-gather
    after the update. ZeRO-2: a reduce-scatter for every micro-batch. ZeRO-3: instead of the gather after the update one
    before each of the unit's forwards and backwards; what is used twice in a row is gathered once, which only the
    schedule knows: `resources/gathers.py` counts those exactly.
    Multi-token prediction uses embedding and head again, a tied head the embedding. The gradients of an embedding at
    both ends of the pipeline are summed over the two ends as well.
    """
    state, microbatches = train.recipe.state, table.stage_microbatches(train.global_batch_size)[:, None]
    apart = (states.copied > 0).astype(np.int64)
    copies = apart * shapes.has_head
    units = shapes.routed_layers + shapes.dense_layers + shapes.has_embedding + shapes.has_head + copies
    size, zero = table.dense_replicas, table.zero_dense[:, None]
    over_ends = states.copied // np.where(zero >= 1, size[:, None], 1)
    reducing, gathering = [Call("all_reduce", "ends", apart, over_ends * state.gradient)], []
    routed = shapes.routed_layers
    dense = ("dp", states.dense, units, states.used, states.uses, size, zero)
    expert = ("edp", states.expert, routed, states.expert, routed, table.expert_replicas, table.zero_expert[:, None])
    for axis, elements, held, used, uses, group, level in (dense, expert):
        shared = ((group > 1)[:, None] & (elements > 0)).astype(np.int64)
        replicated = shared * (level == 0)
        scatters = shared * np.where(level >= 2, microbatches * uses, (level == 1) * held)
        whole = shared * elements
        summed = np.where(level >= 2, microbatches * shared * used, (level == 1) * whole)
        reducing.append(Call("all_reduce", axis, replicated * held, replicated * elements * state.gradient))
        reducing.append(Call("reduce_scatter", axis, scatters, summed * state.gradient))
        gathers = shared * np.where(level == 3, 2 * microbatches * uses, (level >= 1) * held)
        gathered = np.where(level == 3, 2 * microbatches * shared * used, (level >= 1) * whole)
        gathering.append(Call("all_gather", axis, gathers, gathered * state.weight))
    return reducing, gathering


def sync_seconds(
    platform: Platform, train: TrainConfig, shapes: StageShapes, table: StrategyTable, states: StateElements
) -> tuple[Any, Any, Any]:
    """Seconds of reducing gradients, agreeing on their norm over the world (rows, 1) and gathering weights."""
    reducing, gathering = sync_calls(train, shapes, table, states)
    columns = _as_columns(table)

    def total(calls: list[Call]) -> Any:
        return sum(
            collective_seconds(platform, call.collective, spread(columns, call.axis), call.bytes, call.calls)
            for call in calls
        )

    agreed = collective_seconds(platform, "all_reduce", spread(columns, "world"), TOTALS_BYTES)
    return total(reducing), agreed, total(gathering)


def _as_columns(table: StrategyTable) -> StrategyTable:
    """The table with columns (rows, 1), beside which figures of stages stand."""
    return table.take(np.arange(len(table))[:, None])


def traffic(
    train: TrainConfig,
    sizes: Sizes,
    shapes: StageShapes,
    table: StrategyTable,
    states: StateElements,
    sends: Any,
    ep_rank: int = 0,
) -> dict[str, Call]:
    """All calls of one step on one rank of every pipeline rank; `shapes` and `sends` (messages per micro-batch that
    leave the rank) are per rank, `ep_rank` its place among those that share the experts.
    """
    microbatches = table.stage_microbatches(train.global_batch_size)[:, None]
    inside = exchanges(sizes, shapes, ep_rank)
    reducing, gathering = sync_calls(train, shapes, table, states)
    sent = microbatches * sends
    several = np.broadcast_to((table.world_size > 1)[:, None], sent.shape).astype(np.int64)
    total: dict[str, Call] = {}
    for call in (*inside.forward, *inside.backward):
        _add(total, replace(call, calls=microbatches * call.calls, bytes=microbatches * call.bytes))
    for call in (
        *reducing,
        *gathering,
        _load_counts(sizes.model, shapes, table),
        Call("all_reduce", "world", several, several * TOTALS_BYTES),
        Call("send", "pp", sent, sent * _column(message_bytes(sizes))),
    ):
        _add(total, call)
    return total


def _load_counts(model: ModelSpec, shapes: StageShapes, table: StrategyTable) -> Call:
    """Correction biases move by the load of the whole batch: one sum of all layers' int64 counts over its replicas."""
    several = (table.dense_replicas > 1)[:, None]
    counted = several & (shapes.routed_layers > 0) & (model.moe.router.correction_bias != "none")
    size = shapes.routed_layers * model.moe.num_experts * COUNT_BYTES
    return Call("all_reduce", "dp", counted.astype(np.int64), counted * size)


def _add(total: dict[str, Call], call: Call) -> None:
    before = total.get(call.key)
    total[call.key] = (
        call if before is None else replace(call, calls=before.calls + call.calls, bytes=before.bytes + call.bytes)
    )
