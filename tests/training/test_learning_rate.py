"""The learning rate of every step."""

from __future__ import annotations

import pytest

from pipermoe.specs.train import Optimizer
from pipermoe.training.learning_rate import learning_rate

CONFIG = Optimizer(learning_rate=1.0, minimum_learning_rate=0.1, warmup_steps=4)


def test_warm_up_is_linear_and_the_first_step_learns():
    assert [learning_rate(step, CONFIG, 104) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_is_half_way_in_the_middle_and_ends_at_the_minimum():
    assert learning_rate(53, CONFIG, 104) == pytest.approx(0.55)
    assert learning_rate(103, CONFIG, 104) == pytest.approx(0.1)
    assert learning_rate(500, CONFIG, 104) == pytest.approx(0.1)


def test_the_rate_never_rises_after_warm_up():
    rates = [learning_rate(step, CONFIG, 50) for step in range(3, 60)]
    assert rates == sorted(rates, reverse=True)


def test_a_run_shorter_than_its_warm_up_is_all_warm_up():
    assert [learning_rate(step, CONFIG, 2) for step in range(2)] == [0.25, 0.5]
