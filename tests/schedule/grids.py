"""Small pipelines over which properties of all schedules are tested."""

from hypothesis import assume, settings
from hypothesis import strategies as st

from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders import RECIPES, build, illegal

SLOWLY = settings(deadline=None, max_examples=60)
NAMES = list(RECIPES)


def virtual_stages(name: str) -> int:
    """The least number of chunks per rank of a named schedule."""
    return RECIPES[name].virtual_stages[0]


@st.composite
def pipelines(draw, names=NAMES, most_ranks=6, most_microbatches=14) -> Schedule:
    """Any named schedule for a few ranks and micro-batches."""
    name = draw(st.sampled_from(names))
    least, most = RECIPES[name].virtual_stages
    sizes = (
        draw(st.integers(1, most_ranks)),
        draw(st.integers(1, most_microbatches)),
        draw(st.integers(least, most or 3)),
    )
    assume(illegal(name, *sizes) is None)
    return build(name, *sizes)
