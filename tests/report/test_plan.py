import io

from rich.console import Console
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner import PlanningResult, find_plan
from pipermoe.report.bars import bar
from pipermoe.report.plan import render_planning
from pipermoe.specs.strategy_text import strategy_text


def printed(result: PlanningResult) -> str:
    stream = io.StringIO()
    render_planning(result, Console(file=stream, width=80))
    return stream.getvalue()


def test_a_plan_is_printed_in_a_hundred_columns_without_colour_where_none_is_wanted():
    result = find_plan(MODEL, machine(compute_slots=2), TRAIN, world_size=4, memory_budget_bytes=9 * 2**20)
    text = printed(result)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("CHOSEN") == 1
    assert "4 ranks on 2 cores, 9.00 MiB each" in text
    for row in result.ranked:
        assert {*strategy_text(row.strategy).split()} <= {*text.split()}
    for title in ("Where the step goes", "Bound by", "Memory", "Why not", "What would help"):
        assert title in text


def test_what_is_kept_free_is_said_and_no_plan_takes_it():
    free = find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=9 * 2**20, headroom=0.2)
    assert "9.00 MiB each, 20% of it left free (--headroom)" in printed(free)
    assert free.chosen.peak_bytes <= 0.8 * 9 * 2**20 < free.plan.memory_budget_bytes == 9 * 2**20
    assert free.plan.inputs["headroom"].value == 0.2


def test_the_order_of_rows_within_the_models_error_is_not_called_certain():
    result = find_plan(MODEL, machine(), TRAIN, world_size=4, top=3)
    for error, said in ((9.9, "All rows lie within"), (0.0, "All other rows are slower by more than that")):
        band = result.error_band.model_copy(update={"error": error})
        assert said in " ".join(printed(result.model_copy(update={"error_band": band})).split())


def test_a_difference_that_would_be_printed_as_none_is_called_as_fast():
    result = find_plan(MODEL, machine(), TRAIN, world_size=4, top=1)
    change = result.explanation.what_ifs[0]
    for gain, said in ((-4e-4, "as fast"), (-5e-3, "-0.5% tokens/s"), (0.2, "+20% tokens/s")):
        explanation = result.explanation.model_copy(
            update={"what_ifs": (change.model_copy(update={"gain": gain, "name": "X"}),)}
        )
        assert f"X {said}" in " ".join(printed(result.model_copy(update={"explanation": explanation})).split())


def test_the_result_survives_json():
    result = find_plan(MODEL, machine(), TRAIN, world_size=4)
    assert PlanningResult.model_validate_json(result.model_dump_json()) == result


def test_a_bar_is_exact_to_an_eighth_of_a_cell_and_never_empty():
    assert [bar(share, cells=2) for share in (0, 1 / 16, 0.5, 9 / 16, 1)] == ["▏", "▏", "█", "█▏", "██"]
