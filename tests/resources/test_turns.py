"""The order of steps is the one in which the runtime runs two generators beside each other."""

from contextlib import nullcontext

import pytest

from pipermoe.resources.turns import Part, in_turn, turns
from pipermoe.runtime.pipeline.flight import Arrived
from pipermoe.runtime.pipeline.interleave import Pause, Running, beside

STAGES = (
    (Part.EMBEDDING, Part.DENSE, Part.MOE, Part.MOE),
    (Part.MOE,),
    (Part.DENSE,),
    (Part.MOE, Part.DENSE, Part.MOE, Part.HEAD, Part.JOIN, Part.MOE, Part.HEAD),
)


def run_by_the_runtime(ahead, behind):
    """The steps of both as `beside` takes them; None where it asks for weight gradients."""
    taken = []

    def generator(works):
        for turn in works[:-1]:
            taken.extend(turn.steps)
            yield Pause(Arrived(None), brief=turn.brief)
        taken.extend(works[-1].steps)

    def fill():
        taken.append(None)
        return True

    forward, backward = (
        Running(generator(turns(parts, forward=way)), nullcontext) for parts, way in ((ahead, True), (behind, False))
    )
    beside(forward, backward, fill)
    return taken


@pytest.mark.parametrize("ahead", STAGES)
@pytest.mark.parametrize("behind", STAGES)
def test_a_pair_takes_its_steps_in_the_order_of_the_runtime(ahead, behind):
    steps = list(in_turn(turns(ahead, forward=True), turns(behind, forward=False)))
    assert steps == run_by_the_runtime(ahead, behind)
    assert sum(step is not None and step.first for step in steps) == len(ahead) + len(behind)
