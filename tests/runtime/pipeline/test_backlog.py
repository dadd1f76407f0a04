import weakref
from functools import partial

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


def test_a_weight_gradient_that_has_run_lets_go_of_what_it_read():
    class Read:
        pass

    backlog, held = Backlog(LATER), []
    read = [Read(), Read()]
    references = [weakref.ref(each) for each in read]
    queue = backlog.open(0, 0)

    def note(each: Read) -> None:
        held.append([there() is not None for there in references])

    queue += [partial(note, read.pop(0)) for _ in references]
    del queue
    backlog.finish(LATER[0])
    assert held == [[True, True], [False, True]]


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
