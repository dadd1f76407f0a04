"""How groups lie, as formulas read it, beside the groups that the mesh lists."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.specs.test_mesh import folded

from pipermoe.specs.mesh import coordinates, groups
from pipermoe.specs.spread import Axis, spread
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable

AXES: tuple[Axis, ...] = ("tp", "cp", "etp", "ep", "dp", "edp", "pp", "ends", "world")


def listed(strategy: Strategy, axis: Axis) -> list[tuple[int, ...]]:
    """The groups of several ranks along an axis; "dp" are all ranks that hold the same dense parameters."""
    if axis == "world":
        return [tuple(range(strategy.world_size))]
    if axis != "dp":
        return [group for group in groups(strategy, axis) if len(group) > 1]
    tp = [coordinates(strategy, rank).tp for rank in range(strategy.world_size)]
    stages = groups(strategy, "stage")
    return [tuple(r for r in stage if tp[r] == place) for stage in stages for place in range(strategy.tensor_parallel)]


@settings(deadline=None, max_examples=60)
@given(folded(), st.sampled_from(AXES))
def test_a_group_has_its_ranks_inside_of_its_span(strategy, axis):
    found = spread(StrategyTable.of([strategy]), axis)
    span = int(np.squeeze(found.span))
    for group in listed(strategy, axis):
        assert len(group) == np.squeeze(found.ranks)
        assert len({rank // span for rank in group}) == 1


@pytest.mark.parametrize("text", ["pp2 dp4 ep2 dualpipe", "pp4 dp2 ep2 dualpipe", "pp4 dp4 ep2 dualpipe pp-dp"])
@pytest.mark.parametrize("axis", ["dp", "edp"])
def test_replicas_at_both_homes_of_a_stage_lie_inside_of_one_span(text, axis):
    strategy = Strategy.parse(text)
    found = spread(StrategyTable.of([strategy]), axis)
    for group in groups(strategy, axis):
        assert len(group) == found.ranks.item()
        assert len({rank // found.span.item() for rank in group}) == 1


@settings(deadline=None, max_examples=60)
@given(folded(degrees=(1, 2, 4)), st.sampled_from(AXES), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_as_many_ranks_of_a_group_share_a_block_as_the_mesh_puts_there(strategy, axis, block):
    """Exactly, where blocks and groups nest, as powers of two do."""
    inside = np.squeeze(spread(StrategyTable.of([strategy]), axis).inside(block))
    for group in listed(strategy, axis):
        assert set(Counter(rank // block for rank in group).values()) == {int(inside)}
