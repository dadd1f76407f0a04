"""A strategy in one line comes back as it was."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.schedule.builders import RECIPES
from pipermoe.specs.errors import UserError
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.strategy_table import DISPATCHER_NAMES, EXCHANGE_NAMES, RANK_ORDERS, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.strategy_text import strategy_text

degree = st.integers(1, 64)


@st.composite
def strategies(draw) -> Strategy:
    cp, tp, ep, edp, etp = (draw(degree) for _ in range(5))
    recompute = draw(st.sampled_from(["none", "full", "selective"]))
    dispatcher = draw(st.sampled_from(DISPATCHER_NAMES))
    return Strategy(
        pipeline_parallel=draw(degree),
        virtual_stages=draw(degree),
        data_parallel=ep * edp * etp,
        context_parallel=cp,
        tensor_parallel=tp,
        expert_parallel=ep * cp,
        expert_data_parallel=edp * tp,
        expert_tensor_parallel=etp,
        micro_batch_size=draw(degree),
        schedule=draw(st.sampled_from(SCHEDULE_NAMES)),
        dispatcher=dispatcher,
        ranks_per_copy=draw(degree) if dispatcher == "deduplicated" else 1,
        exchange=draw(st.sampled_from(EXCHANGE_NAMES)),
        rank_order=draw(st.sampled_from(RANK_ORDERS)),
        layer_split=tuple(draw(st.lists(st.sampled_from([1, 2, 13]), max_size=12))),
        recompute=recompute,
        recompute_modules=tuple(draw(st.lists(st.sampled_from(RECOMPUTE_MODULES), min_size=1, max_size=3)))
        if recompute == "selective"
        else (),
        zero_dense=draw(st.integers(0, 3)),
        zero_expert=draw(st.integers(0, 3)),
    )


@settings(deadline=None, max_examples=100)
@given(strategies())
def test_a_strategy_in_words_is_read_back(strategy):
    assert Strategy.parse(strategy_text(strategy)) == strategy
    kept = Strategy.parse(strategy.compact())
    assert kept.compact() == strategy.compact()
    assert kept.world_size == strategy.world_size
    assert StrategyTable.of([strategy]).row(0) == strategy


def test_words_come_in_any_order_and_edp_is_what_the_others_leave():
    strategy = Strategy.parse("z1 ep32 dp64 1f1b mbs1 pp8")
    assert (strategy.expert_data_parallel, strategy.zero_dense, strategy.world_size) == (2, 1, 512)


def test_a_long_run_of_equal_stages_is_one_word():
    strategy = Strategy(pipeline_parallel=8, layer_split=(1, 2, 2, 2, 2, 2, 1, 1))
    assert strategy_text(strategy).endswith("split:1,5x2,1,1")
    assert Strategy.parse("pp8 split:1,2,2,2,2,2,2x1") == strategy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pp8 foo2", "'foo2' is no word of a strategy; accepted: a degree (ppN, vppN"),
        ("pp0", "'pp0' is no word"),
        ("pp2 zb-x", "'zb-x' is no word of a strategy; did you mean zb-v?"),
        ("pp2 pp4", "pp4: pipeline_parallel is given twice"),
        ("z4", "'z4' is no word"),
        ("deduplicated:0", "'deduplicated:0' is no word"),
        ("all_to_all:2", "'all_to_all:2' is no word"),
        ("split:1,,2", "'split:1,,2' is no word"),
        ("split:0x2", "'split:0x2' is no word"),
        ("dp4 ep8", "data_parallel * context_parallel * tensor_parallel = 4 must equal"),
        ("", "strategy '': must name a degree"),
    ],
)
def test_an_error_names_the_word_and_what_is_accepted(text, message):
    with pytest.raises(UserError) as refused:
        Strategy.parse(text)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_every_schedule_that_can_be_built_has_its_word():
    assert set(SCHEDULE_NAMES) == set(RECIPES)
