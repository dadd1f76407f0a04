import numpy as np
import pytest

from pipermoe.resources.activations.ledger import BlockMemory, Held, Ledger, alone


def test_a_step_holds_at_most_what_its_tensors_are_together():
    work = Ledger("temporary", Held(activations=10.0))
    work.take(4)
    work.drop(10, of="activations")
    work.take(3)
    work.end_step()
    work.brief(1)
    work.end_step()
    assert [step.peak.total for step in work.steps] == [14, 8]
    assert work.now == Held(0, 0, 7)


@pytest.mark.parametrize(("defers", "peaks", "left"), [(False, [5, 4], 0), (True, [5, 9], 5)])
def test_what_weight_gradients_read_stays_until_they_have_run(defers, peaks, left):
    work = Ledger("temporary", defers=defers)
    work.take(5)
    work.release(5)
    work.end_step()
    work.take(4)
    work.end_step()
    steps = tuple(work.steps)
    assert [step.peak.total for step in steps] == [5, 4]  # in a pair the weight gradients have run in between
    assert alone(steps).total == max(peaks)
    assert BlockMemory(Held(), (), (), steps, Held()).deferred.total == left


def test_each_strategy_has_a_peak_of_its_own():
    work = Ledger("activations")
    work.brief(np.array([3.0, 1.0]))
    work.take(np.array([2.0, 2.0]), of="communication")
    work.end_step()
    [step] = work.steps
    assert step.peak.total.tolist() == [3, 2]
    assert step.peak.communication.tolist() == [0, 2]
