import io

from rich.console import Console
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner import PlanningResult, find_plan
from pipermoe.report.bars import bar
from pipermoe.report.plan import recompute, render_planning, schedule
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_text import unusual


def test_a_plan_is_printed_in_a_hundred_columns_without_colour_where_none_is_wanted():
    result = find_plan(MODEL, machine(compute_slots=2), TRAIN, world_size=4, memory_budget_bytes=9 * 2**20)
    stream = io.StringIO()
    render_planning(result, Console(file=stream, width=80))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("CHOSEN") == 1
    assert "4 ranks on 2 cores, 9.00 MiB each" in text
    for row in result.ranked:
        assert {*row.strategy.compact().split()} <= {*text.split()}
    for title in ("Where the step goes", "Bound by", "Memory", "Why not", "What would help"):
        assert title in text


def test_a_row_says_all_that_is_unusual_about_its_strategy():
    plain = Strategy.parse("pp1 dp4 ep4 mbs1")
    assert schedule(plain) == ""
    assert schedule(plain.model_copy(update={"schedule": "1f1b-overlap"})) == "1f1b-overlap"
    assert unusual(plain) == []
    assert unusual(Strategy.parse("pp1 dp4 ep4 mbs1 deduplicated planned")) == ["deduplicated", "planned"]
    assert recompute(Strategy.parse("pp1 dp4 ep4 selective:norm,moe_act")) == "norm, moe_act"
    most = "selective:norm,attention,moe_act,experts,shared_experts"
    assert recompute(Strategy.parse(f"pp1 dp4 ep4 {most}")) == "all but dense_mlp"
    assert recompute(Strategy.parse(f"pp1 dp4 ep4 {most},dense_mlp")) == "all modules"


def test_the_result_survives_json():
    result = find_plan(MODEL, machine(), TRAIN, world_size=4)
    assert PlanningResult.model_validate_json(result.model_dump_json()) == result


def test_a_bar_is_exact_to_an_eighth_of_a_cell_and_never_empty():
    assert [bar(share, cells=2) for share in (0, 1 / 16, 0.5, 9 / 16, 1)] == ["▏", "▏", "█", "█▏", "██"]
