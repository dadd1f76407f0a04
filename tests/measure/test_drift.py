"""A re-measured sample is compared rate by rate."""

import pytest
from tests.resources.cases import machine

from pipermoe.measure.drift import drifts
from pipermoe.specs.device import RateCurve

THEN = machine()


def slower_gemm(factor: float):
    curves = {
        precision: RateCurve(size=curve.size, rate=tuple(rate * factor for rate in curve.rate))
        for precision, curve in THEN.device.gemm.items()
    }
    return THEN.model_copy(update={"device": THEN.device.model_copy(update={"gemm": curves})})


def test_the_same_machine_has_not_drifted():
    assert {drift.ratio for drift in drifts(THEN, THEN)} == {1.0}
    assert not any(drift.is_large for drift in drifts(THEN, THEN))


@pytest.mark.parametrize(("factor", "large"), [(0.9, False), (0.5, True), (1.5, True)])
def test_a_changed_rate_is_named(factor, large):
    changed = [drift for drift in drifts(THEN, slower_gemm(factor)) if drift.ratio != 1]
    assert [(drift.key, drift.ratio, drift.is_large) for drift in changed] == [("device.gemm.fp32", factor, large)]
