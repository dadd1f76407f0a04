"""The tables of `pipermoe describe`: they fit 80 columns and hold the figures."""

from io import StringIO

import pytest
from rich.console import Console

from pipermoe.report.describe import format_parameters, render_description
from pipermoe.resources.describe import describe_model
from pipermoe.specs.catalogue import load_model, model_names


def rendered(name: str) -> str:
    console = Console(file=StringIO(), width=80, color_system=None)
    render_description(describe_model(load_model(name)), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_catalogue_fits_80_columns_without_cutting_a_number(name):
    text = rendered(name)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_the_totals_and_every_component_are_there():
    text = rendered("deepseek-v3")
    for expected in (
        "671.03B parameters",
        "37.55B active",
        "44.04M per expert",
        "671,026,404,352",
        "routed experts         653,908,770,816  97.4%",
        "shared experts",
        "+ 1 MTP module, apart",
        "58 x experts",
        "3 x dense",
        "281,158,232,064",
    ):
        assert expected in text


def test_parameters_are_rounded_as_models_are_named():
    values = (7, 1_500, 44_040_192, 671_026_404_352, 1_026_408_209_408)
    assert [format_parameters(value) for value in values] == ["7", "1.50k", "44.04M", "671.03B", "1.03T"]
