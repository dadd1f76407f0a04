"""When to look for a layout, and when to take it."""

import numpy as np
import pytest

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.trigger import Trigger, gain_rows, gain_that_stays, horizon_steps, pays

EVEN = ExpertLayout(np.array([[[0, 1], [2, 3]]]), 4)
CROSSED = ExpertLayout(np.array([[[0, 3], [2, 1]]]), 4)
SKEWED = np.array([[9, 8, 2, 1]])


def test_a_trigger_asks_every_so_many_steps_and_above_its_threshold():
    trigger = Trigger(every_steps=10, threshold=1.5)
    assert trigger.fires(20, (1.0, 1.7))
    assert not trigger.fires(21, (1.0, 1.7))
    assert not trigger.fires(20, (1.0, 1.2))
    assert trigger.fires(20, (1.0, 1.2), spilled=True)


@pytest.mark.parametrize("values", [{"every_steps": 0}, {"threshold": 0.9}])
def test_a_trigger_that_means_nothing_is_refused(values):
    with pytest.raises(ValueError, match="must be at least 1"):
        Trigger(**values)


def test_a_move_must_earn_its_time_while_the_forecast_lives():
    assert pays(gain_seconds_per_step=0.01, horizon_steps=100, stays=0.9, move_seconds=0.5)
    assert not pays(gain_seconds_per_step=0.01, horizon_steps=100, stays=0.4, move_seconds=0.5)


def test_copies_take_rows_as_they_have_room_not_evenly():
    spare = ExpertLayout(np.array([[[0, 1, -1], [2, 3, 0]]]), 4)
    assert gain_rows(EVEN, spare, SKEWED) == 7  # the second rank takes 7 of the 9 rows of expert 0, not half of them


def test_the_gain_stays_as_far_as_the_past_would_have_had_it():
    assert gain_rows(EVEN, CROSSED, SKEWED) == 7
    assert gain_that_stays(EVEN, CROSSED, [SKEWED, SKEWED]) == 1.0
    elsewhere = np.array([[9, 1, 2, 8]])  # here the new layout would have cost as much
    assert gain_that_stays(EVEN, CROSSED, [elsewhere, SKEWED]) == 0.0
    assert gain_that_stays(CROSSED, EVEN, [SKEWED]) == 0.0


def test_a_forecast_lives_until_the_load_has_drifted_too_far():
    windows = [np.array([[50, 50]]), np.array([[52, 48]]), np.array([[54, 46]])]  # 0.02 in 10 steps
    assert horizon_steps(windows, 10, tolerance=0.1) == pytest.approx(50)
    assert horizon_steps(windows[:1], 10, most=700) == 700
