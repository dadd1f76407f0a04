from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.resources.cases import MODEL, machine

from pipermoe.resources.bound import step_bound
from pipermoe.resources.evaluate import evaluate
from pipermoe.resources.floor import memory_floor
from pipermoe.resources.groups import Groups
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.quick_bound import quick_bound
from pipermoe.resources.step import predict
from pipermoe.resources.unit_seconds import unit_seconds
from pipermoe.schedule.builders import RECIPES
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.platform import Host, Platform
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

RANKS = 16
JOBS = {
    "small": TrainConfig(seq_len=32, global_batch_size=64),
    "mixtral-8x7b": TrainConfig(seq_len=4096, global_batch_size=64, precision="bf16"),
    "deepseek-v2-lite": TrainConfig(seq_len=4096, global_batch_size=64, precision="bf16"),
    "two predictions": TrainConfig(seq_len=512, global_batch_size=64, precision="bf16"),
}


# What strategies below have, each in its own combination.
WAYS = [{"dispatcher": sends, "ranks_per_copy": 1, "exchange": plan} for sends in (0, 1) for plan in (0, 1)]
LEVELS = [{"zero_dense": dense, "zero_expert": expert} for dense in range(4) for expert in range(4)]


@cache
def model_of(name):
    if name == "two predictions":
        return load_model("deepseek-v2-lite").model_copy(update={"mtp_layers": 2})
    return MODEL if name == "small" else load_model(name)


@cache
def platform_of(name: str) -> Platform:
    crowded = machine(RANKS, 1.7, meeting_seconds={2: 1e-3, 4: 3e-3})
    if name == "crowded hosts":  # of two ranks each
        host = Host(ranks=2, compute_slots=1.2, meeting_seconds=crowded.host.meeting_seconds)
        return crowded.model_copy(update={"host": host})
    if name in ("crowded", "machine"):
        return crowded if name == "crowded" else machine(RANKS)
    return load_platform(name)


@st.composite
def strategies(draw, ranks: int = RANKS):
    """Any strategy of `ranks` ranks that divides them, legal for a model or not."""
    name = draw(st.sampled_from(sorted(RECIPES)))
    least, most = RECIPES[name].virtual_stages
    powers = [2**i for i in range(ranks.bit_length())]
    pp = draw(st.sampled_from(powers))
    tp = draw(st.sampled_from([n for n in powers if n * pp <= ranks]))
    cp = draw(st.sampled_from([n for n in powers if n * tp * pp <= ranks]))
    ep = draw(st.sampled_from([n for n in powers if n * pp <= ranks]))
    etp = draw(st.sampled_from([n for n in powers if n * ep * pp <= ranks]))
    modules = draw(st.sets(st.sampled_from(RECOMPUTE_MODULES)))
    recompute = "selective" if modules else draw(st.sampled_from(["none", "full"]))
    return Strategy(
        pipeline_parallel=pp,
        virtual_stages=draw(st.integers(least, min(most or 3, 3))),
        data_parallel=ranks // (pp * cp * tp),
        context_parallel=cp,
        tensor_parallel=tp,
        expert_parallel=ep,
        expert_data_parallel=ranks // (pp * ep * etp),
        expert_tensor_parallel=etp,
        micro_batch_size=draw(st.sampled_from([1, 2, 4])),
        schedule=name,
        dispatcher=draw(st.sampled_from(["all_to_all", "deduplicated"])),
        exchange=draw(st.sampled_from(["library", "planned"])),
        rank_order=draw(st.sampled_from(["dp-pp", "pp-dp"])),
        recompute=recompute,
        recompute_modules=tuple(modules),
        zero_dense=draw(st.integers(0, 3)),
        zero_expert=draw(st.integers(0, 3)),
    )


@st.composite
def cases(draw):
    """A model, one of its platforms and a few legal strategies."""
    name = draw(st.sampled_from(sorted(JOBS)))
    platform = draw(
        st.sampled_from(["crowded", "crowded hosts", "machine"] if name == "small" else ["dgx-h100", "frontier"])
    )
    table = StrategyTable.of(draw(st.lists(strategies(), min_size=2, max_size=6)))
    legal = legal_mask(table, model_of(name), JOBS[name], RANKS, POSSIBLE)
    return name, platform, table.take(legal)


@settings(deadline=None, max_examples=20)
@given(cases())
def test_no_simulation_of_any_strategy_undercuts_its_bound(case):
    name, platform, table = case
    model, machine_, train = model_of(name), platform_of(platform), JOBS[name]
    bound = step_bound(model, machine_, train, table)
    at_best = step_bound(model, machine_, train, table, ways=WAYS, levels=LEVELS)
    quick = (
        quick_bound(Groups(model, train, table), partial(unit_seconds, model, machine_, train)) if len(table) else []
    )
    for row in range(len(table)):
        exact = predict(model, machine_, train, table.row(row)).step_seconds
        assert at_best[row] <= bound[row] * (1 + 1e-12)
        assert quick[row] <= bound[row] * (1 + 1e-12)
        assert bound[row] <= exact * (1 + 1e-12)
        assert bound[row] > 0.3 * exact


@settings(deadline=None, max_examples=40)
@given(cases())
def test_no_order_of_a_schedule_holds_less_than_the_floor(case):
    name, _, table = case
    floor, peak = memory_floor(model_of(name), JOBS[name], table), peak_bytes(model_of(name), JOBS[name], table)
    assert (memory_floor(model_of(name), JOBS[name], table, ways=WAYS, levels=LEVELS) <= floor).all()
    assert (floor <= peak).all()
    assert (floor > 0.3 * peak).all()


@settings(deadline=None, max_examples=10)
@given(cases())
def test_a_strategy_is_judged_alone_as_among_others(case):
    name, platform, table = case
    model, machine_, train = model_of(name), platform_of(platform), JOBS[name]
    together = evaluate(model, machine_, train, table)
    assert together.peak_bytes.tolist() == peak_bytes(model, train, table).tolist()
    for row in range(len(table)):
        alone = evaluate(model, machine_, train, table.take(np.array([row])))
        assert alone.bound[0] == together.bound[row]
        assert alone.peak_bytes[0] == together.peak_bytes[row]


def test_a_table_is_judged_in_any_order_of_its_rows():
    """Side by side rows are grouped as runs, others by sorting."""
    axes = {
        "schedule": [SCHEDULE_NAMES.index(name) for name in ("1f1b", "zb-h1-overlap", "gpipe")],
        "pipeline_parallel": [2, 4],
        "data_parallel": [4],
        "expert_parallel": [2, 4],
        "micro_batch_size": [1, 2],
        "dispatcher": [0, 1],
        "exchange": [0, 1],
        "recompute": [0, 2],
        "zero_dense": [0, 1, 3],
        "zero_expert": [0, 1, 3],
    }
    model, machine_, train = model_of("mixtral-8x7b"), platform_of("dgx-h100"), JOBS["mixtral-8x7b"]
    table = StrategyTable.product(**axes)
    anyhow = np.random.default_rng(0).permutation(len(table))
    for judge in (partial(memory_floor, model, train), partial(step_bound, model, machine_, train)):
        assert (judge(table)[anyhow] == judge(table.take(anyhow))).all()
        assert (judge(table)[anyhow[:40]] == [judge(table.take(anyhow[i : i + 1]))[0] for i in range(40)]).all()


@settings(deadline=None, max_examples=10)
@given(cases())
def test_sums_over_a_path_are_exact_in_any_order(case):
    """Of whole ticks, 2^-34 s: below 2^53 of them, which is 2^19 s."""
    name, _, table = case
    if len(table):
        found = Groups(model_of(name), JOBS[name], table).chains()
        counts = np.concatenate([count for each in found for count in (each.once, each.each)])
        assert (2 * counts == np.rint(2 * counts)).all()
        assert np.abs(counts).sum(axis=1).max() < 1 << 14


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bound_of_equal_stages_without_messages_is_the_step(schedule):
    """Fill, every micro-batch and drain are all there is to it (Narayanan et al. 2021, section 2.2)."""
    model = load_model("mixtral-8x7b").model_copy(update={"num_layers": 16})
    platform = platform_of("dgx-h100")
    strategy = Strategy(pipeline_parallel=8, data_parallel=2, expert_parallel=2, schedule=schedule)
    train = JOBS["mixtral-8x7b"]
    [bound] = step_bound(model, platform, train, StrategyTable.of([strategy]))
    exact = predict(model, platform, train, strategy).step_seconds
    assert 0.97 * exact <= bound <= exact
