from pipermoe.runtime.pipeline.backlog import Backlog
from pipermoe.schedule.action import Action, Kind

LATER = [Action(Kind.WEIGHT_GRAD, 0, microbatch) for microbatch in range(3)]


def test_weight_gradients_run_in_the_order_of_their_actions():
    backlog, done = Backlog(LATER), []
    for microbatch in (0, 1):
        queue = backlog.open(0, microbatch)
        queue += [lambda m=microbatch, i=i: done.append((m, i)) for i in range(2)]
    while (pending := backlog.take()) is not None:
        pending[1]()
    assert done == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_an_action_whose_weight_gradients_have_all_run_holds_up_no_other():
    backlog = Backlog(LATER)
    backlog.open(0, 0)
    backlog.open(0, 1).append(lambda: None)
    pending = backlog.take()
    assert pending is not None
    assert pending[0] == LATER[1]


def test_one_that_is_still_to_come_holds_up_the_later_ones():
    backlog = Backlog(LATER)
    backlog.open(0, 1).append(lambda: None)
    assert backlog.take() is None
