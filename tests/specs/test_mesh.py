import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.specs.mesh import coordinates, group_of, groups, pipeline_ranks, split_layers
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import RANK_ORDERS


@st.composite
def folded(draw, degrees: tuple[int, ...] = (1, 2, 3, 4)) -> Strategy:
    """A strategy whose two arrangements cover the same ranks."""
    degree = st.sampled_from(degrees)
    ep, edp, etp = draw(degree), draw(degree), draw(st.sampled_from([1, 2]))
    inner = ep * edp * etp
    tp = draw(st.sampled_from([d for d in (1, 2) if inner % d == 0]))
    cp = draw(st.sampled_from([d for d in (1, 2) if (inner // tp) % d == 0]))
    return Strategy(
        pipeline_parallel=draw(degree),
        data_parallel=inner // tp // cp,
        context_parallel=cp,
        tensor_parallel=tp,
        expert_parallel=ep,
        expert_data_parallel=edp,
        expert_tensor_parallel=etp,
        rank_order=draw(st.sampled_from(RANK_ORDERS)),
    )


@given(folded())
@settings(deadline=None, max_examples=50)
def test_the_groups_of_every_axis_hold_every_rank_once(strategy):
    for axis in ("pp", "dp", "cp", "tp", "edp", "ep", "etp", "stage"):
        ranks = [rank for group in groups(strategy, axis) for rank in group]
        assert sorted(ranks) == list(range(strategy.world_size))


@given(folded())
@settings(deadline=None, max_examples=50)
def test_a_group_is_ordered_by_the_coordinate_of_its_axis(strategy):
    for axis in ("pp", "dp", "cp", "tp", "edp", "ep", "etp"):
        for group in groups(strategy, axis):
            assert [getattr(coordinates(strategy, rank), axis) for rank in group] == list(range(len(group)))


@given(folded())
@settings(deadline=None, max_examples=50)
def test_the_pipeline_rank_of_every_rank_is_its_coordinate(strategy):
    assert pipeline_ranks(strategy) == [coordinates(strategy, rank).pp for rank in range(strategy.world_size)]


def test_two_stages_of_expert_data_parallelism_are_the_mesh_of_the_paper():
    strategy = Strategy(pipeline_parallel=2, data_parallel=4, expert_parallel=4)
    assert groups(strategy, "ep") == groups(strategy, "dp") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups(strategy, "pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert group_of(strategy, "ep", 6) == (4, 5, 6, 7)


def test_expert_replicas_are_strided_over_expert_groups():
    strategy = Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2)
    assert groups(strategy, "ep") == [(0, 1), (2, 3)]
    assert groups(strategy, "edp") == [(0, 2), (1, 3)]


def test_a_pipeline_inside_data_parallelism_keeps_stages_and_experts_near_and_replicas_far():
    strategy = Strategy.parse("pp2 dp4 ep2 pp-dp")
    assert groups(strategy, "ep") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups(strategy, "pp") == groups(strategy, "ends") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups(strategy, "edp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups(strategy, "dp") == groups(strategy, "stage") == [(0, 1, 4, 5), (2, 3, 6, 7)]


@given(folded())
@settings(deadline=None, max_examples=50)
def test_the_order_of_stages_moves_no_group_of_a_layer_apart(strategy):
    outermost = strategy.model_copy(update={"rank_order": "dp-pp"})
    for axis in ("tp", "cp", "etp", "ep"):
        reach = [{max(ranks) - min(ranks) for ranks in groups(one, axis)} for one in (strategy, outermost)]
        assert reach[0] == reach[1]


def test_experts_on_all_ranks_of_a_stage_have_one_order():
    orders = [Strategy.parse(f"pp2 dp4 ep4 {order}") for order in RANK_ORDERS]
    assert [coordinates(orders[0], rank) for rank in range(8)] == [coordinates(orders[1], rank) for rank in range(8)]


def test_where_every_stage_has_two_homes_the_replicas_of_both_are_one_group():
    strategy = Strategy.parse("pp4 dp2 ep2 dualpipe")
    assert groups(strategy, "dp") == [(0, 1, 6, 7), (2, 3, 4, 5)]
    assert groups(strategy, "edp") == [(0, 6), (1, 7), (2, 4), (3, 5)]
    assert groups(strategy, "ep") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert (strategy.dense_replicas, strategy.expert_replicas) == (4, 2)


def test_a_group_that_shares_copies_falls_into_blocks_and_the_ranks_at_one_place_of_each():
    strategy = Strategy.parse("dp8 ep4 etp2 deduplicated:2")
    assert groups(strategy, "ep") == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert groups(strategy, "ep_inside") == [(0, 2), (4, 6), (1, 3), (5, 7)]
    assert groups(strategy, "ep_across") == [(0, 4), (2, 6), (1, 5), (3, 7)]


def test_layers_are_split_as_evenly_as_possible_or_as_told():
    assert split_layers(6, 2) == [range(3), range(3, 6)]
    assert [len(stage) for stage in split_layers(61, 16)] == [4] * 13 + [3] * 3
    assert split_layers(6, 3, (1, 2, 3)) == [range(1), range(1, 3), range(3, 6)]


@pytest.mark.parametrize(("layers", "stages", "split"), [(2, 4, ()), (6, 2, (3, 4)), (6, 2, (6,))])
def test_a_split_that_leaves_layers_over_is_refused(layers, stages, split):
    with pytest.raises(ValueError, match="layers"):
        split_layers(layers, stages, split)
