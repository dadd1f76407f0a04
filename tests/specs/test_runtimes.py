"""What each runtime can execute: rules over rows, held against one strategy at a time and against the exports."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tests.export.plans import plan_for

from pipermoe.export import export_plan
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.errors import UserError
from pipermoe.specs.legality import Job, columns_read, legal_mask
from pipermoe.specs.runtimes import RUNTIMES, executed_by, runs_on
from pipermoe.specs.runtimes.limits import sharding
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.strategy_table import COLUMNS, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

SLOWLY = settings(deadline=None, max_examples=60)
DEGREES = st.sampled_from([1, 1, 2, 4])
MODELS = st.sampled_from(["qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b"])  # of all frameworks, two, torchtitan


@st.composite
def any_strategies(draw) -> Strategy:
    """Strategies with every field drawn; most of the legal ones break a rule of some runtime."""
    dp, cp, tp, etp = (draw(DEGREES) for _ in range(4))
    ep = draw(st.sampled_from([n for n in (1, 2, 4, 8) if dp * cp * tp % (n * etp) == 0] or [1]))
    etp = etp if dp * cp * tp % (ep * etp) == 0 else 1
    schedule = draw(st.sampled_from([*SCHEDULE_NAMES, "1f1b", "1f1b", "interleaved-1f1b-overlap"]))
    chunks = 1 if schedule.startswith(("gpipe", "1f1b", "zb-h", "dualpipe")) and schedule != "dualpipe-v" else 2
    recompute = draw(st.sampled_from(["none", "full", "selective"]))
    modules = draw(st.sets(st.sampled_from(RECOMPUTE_MODULES), min_size=1)) if recompute == "selective" else ()
    return Strategy(
        pipeline_parallel=draw(DEGREES),
        virtual_stages=chunks,
        data_parallel=dp,
        context_parallel=cp,
        tensor_parallel=tp,
        expert_parallel=ep,
        expert_data_parallel=dp * cp * tp // (ep * etp),
        expert_tensor_parallel=etp,
        micro_batch_size=draw(st.sampled_from([1, 2])),
        schedule=schedule,
        dispatcher=draw(st.sampled_from(["all_to_all", "all_to_all", "deduplicated"])),
        exchange=draw(st.sampled_from(["library", "library", "planned"])),
        rank_order=draw(st.sampled_from(["dp-pp", "dp-pp", "pp-dp"])),
        recompute=recompute,
        recompute_modules=tuple(modules),
        zero_dense=draw(st.integers(0, 3)),
        zero_expert=draw(st.integers(0, 3)),
    )


def is_legal(strategy: Strategy, job: Job) -> bool:
    table = StrategyTable.of([strategy])
    return bool(legal_mask(table, job.model, job.train, job.world_size, POSSIBLE)[0])


@SLOWLY
@given(any_strategies(), MODELS, st.sampled_from(["bf16", "fp32", "fp16"]), st.sampled_from(list(RUNTIMES)))
def test_an_export_is_refused_exactly_where_a_rule_is_broken(strategy, name, precision, runtime):
    plan = plan_for(strategy, load_model(name), precision=precision)
    assume(is_legal(strategy, Job(plan.model, plan.train, strategy.world_size)))
    if runtime in runs_on(plan.model, plan.train, strategy):
        assert "launch.sh" in export_plan(plan, runtime, 1).files
    else:
        with pytest.raises(UserError, match=f": {RUNTIMES[runtime].title}: "):
            export_plan(plan, runtime, 1)


@settings(SLOWLY, max_examples=20)
@given(st.lists(any_strategies(), min_size=2, max_size=6), MODELS)
def test_many_rows_are_judged_as_each_alone(strategies, name):
    table = StrategyTable.of(strategies)
    job = Job(load_model(name), TrainConfig(seq_len=1024, global_batch_size=64, precision="bf16"), 8)
    for runtime in RUNTIMES.values():
        for rule in runtime.rules:
            assert rule.holds(table, job).tolist() == [rule.accepts(strategy, job) for strategy in strategies]


@SLOWLY
@given(any_strategies())
@example(Strategy(schedule="dualpipe"))  # two ranks hold every stage
def test_sharding_levels_of_rows_are_those_of_strategies(strategy):
    alike, unsharded, level = sharding(StrategyTable.of([strategy]))
    levels = strategy.sharding_levels
    assert (alike[0], unsharded[0], level[0]) == (len(levels) < 2, not levels, max(levels, default=0))


def test_columns_that_a_rule_reads_are_all_that_it_depends_on():
    job = Job(load_model("qwen3-30b-a3b"), TrainConfig(seq_len=1024, global_batch_size=64, precision="bf16"), 8)
    table = StrategyTable.of([Strategy()])
    for runtime in RUNTIMES.values():
        for rule in runtime.rules:
            read = columns_read(rule, job)
            other = {name: np.full(1, 99) for name in COLUMNS if name not in read and name != "layer_split"}
            assert rule.holds(table.with_columns(**other), job).tolist() == rule.holds(table, job).tolist()
    assert columns_read(RUNTIMES["megatron"].rules[2], job) == {"schedule"}


def test_a_runtime_that_lacks_the_model_is_refused_and_any_leaves_it_out():
    model, train = load_model("deepseek-v3.2"), TrainConfig(seq_len=1024, global_batch_size=64, precision="bf16")
    with pytest.raises(UserError, match=r"^model.name = 'deepseek-v3.2': torchtitan 0.3.0: registers deepseek-v3, "):
        executed_by("torchtitan", model, train)
    assert executed_by("any", model, train) == executed_by("pipermoe", model, train)
    assert len(executed_by("any", load_model("qwen3-30b-a3b"), train)) == 4


@pytest.mark.parametrize(
    ("text", "name", "runtimes"),
    [
        ("pp2 dp4 ep4 mbs1 1f1b", "qwen3-30b-a3b", ("pipermoe", "megatron")),
        ("pp1 dp8 ep8 mbs1 1f1b z2", "qwen3-30b-a3b", ("pipermoe", "megatron", "torchtitan", "deepspeed")),
        ("pp2 dp4 ep4 mbs1 dualpipe", "qwen3-30b-a3b", ("pipermoe",)),
        ("pp2 dp4 ep4 tp2 etp2 mbs1 dualpipe", "qwen3-30b-a3b", ()),
        ("pp2 vpp2 dp4 ep4 mbs1 zb-v z2", "deepseek-v3", ("pipermoe", "torchtitan")),
        ("pp1 dp4 tp2 ep4 edp2 mbs1 1f1b", "mixtral-8x7b", ("megatron", "deepspeed")),
    ],
)
def test_a_strategy_says_what_runs_it(text, name, runtimes):
    plan = plan_for(text, load_model(name))
    assert runs_on(plan.model, plan.train, plan.strategy) == runtimes
