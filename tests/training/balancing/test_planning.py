"""A search for a layout runs beside training, ends in a layout or an error, and may take too long."""

from threading import Event

import pytest

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.specs.errors import MachineError
from pipermoe.training.balancing.planning import Planning

LAYOUT = ExpertLayout.static(1, 2, 4)


def finished(planning: Planning) -> Planning:
    planning.join()
    return planning


def test_a_search_gives_nothing_until_it_has_ended():
    goes_on = Event()

    def search() -> ExpertLayout:
        goes_on.wait()
        return LAYOUT

    planning = Planning(search, timeout_seconds=1e-9)
    assert planning.result() is None
    assert planning.late
    goes_on.set()
    assert finished(planning).result() is LAYOUT
    assert not planning.late


def test_a_search_that_fails_is_an_error_of_the_run():
    def search() -> ExpertLayout:
        raise ValueError("no slot for expert 3")

    with pytest.raises(MachineError, match="planning an expert layout failed: ValueError: no slot for expert 3"):
        finished(Planning(search, timeout_seconds=60)).result()
