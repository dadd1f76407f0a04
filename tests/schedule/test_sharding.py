"""When sharded weights are gathered and gradients reduced."""

from hypothesis import given
from hypothesis import strategies as st
from tests.schedule.grids import SLOWLY, pipelines

from pipermoe.schedule.action import Kind
from pipermoe.schedule.builders import build
from pipermoe.schedule.checker import check
from pipermoe.schedule.sharding import with_gathered_weights, with_reduction


def test_gathering_runs_ahead_of_its_use():
    schedule = with_gathered_weights(build("breadth-first", 1, 2, 3))
    assert str(schedule) == (
        "0UNSHARD 1UNSHARD 0F0 0F1 0RESHARD 2UNSHARD 1F0 1F1 2F0 2F1 2B0 2B1 2RESHARD 0UNSHARD 1B0 1B1 "
        "1RESHARD 0B0 0B1 0RESHARD"
    )


@SLOWLY
@given(pipelines(), st.integers(1, 4))
def test_at_most_so_many_stages_are_gathered_at_once(schedule, resident):
    gathered = with_gathered_weights(schedule, resident)
    assert check(gathered) == []
    pairs = any(action.kind is Kind.OVERLAP for actions in schedule.ranks for action in actions)
    for actions in gathered.ranks:
        now = 0
        for action in actions:
            now += (action.kind is Kind.UNSHARD) - (action.kind is Kind.RESHARD)
            assert 0 <= now <= max(resident, 2 if pairs else 1)
        assert now == 0


def test_every_stage_is_reduced_once_after_its_last_gradient():
    assert str(with_reduction(build("zb-v", 1, 2, 2))) == (
        "0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 1REDUCE_GRAD 0I1 0W1 0REDUCE_GRAD"
    )
