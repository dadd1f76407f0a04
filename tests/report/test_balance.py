"""The table and the picture of a comparison of layout policies."""

import numpy as np
import pytest
from rich.console import Console

from pipermoe.layout.policies import POLICIES
from pipermoe.layout.replay import Comparison, compare_policies
from pipermoe.layout.trace import Trace
from pipermoe.report.balance import draw_comparison, render_comparison


@pytest.fixture
def found() -> Comparison:
    trace = Trace("skewed", np.tile(np.array([[[9, 8, 2, 1]]]), (4, 1, 1)))
    chosen = {name: POLICIES[name] for name in ("static", "swaps")}
    return compare_policies(trace, chosen, ranks=2, nodes=1, slots=2, every=2, window=1)


def test_the_table_has_a_row_for_each_policy_and_fits_a_terminal(found):
    console = Console(width=100, record=True)
    render_comparison(found, console)
    lines = console.export_text().splitlines()
    (static,) = (line for line in lines if line.startswith("static"))
    assert static.split()[1:5] == ["1.7000"] * 4
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("swaps") for line in lines)


def test_the_picture_has_a_bar_for_each_step_and_says_what_its_colours_are(found, tmp_path):
    draw_comparison(found, tmp_path / "balance.svg")
    text = (tmp_path / "balance.svg").read_text()
    assert text.count("<title>static, from step") == 3
    assert "each bar the mean of a step, from 1 (bottom) to 1.70 (top), orange above 1.5" in text
