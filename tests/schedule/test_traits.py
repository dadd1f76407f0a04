import pytest

from pipermoe.schedule.action import Kind
from pipermoe.schedule.builders import RECIPES, build
from pipermoe.schedule.traits import schedule_traits, ways
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_traits_said_of_a_name_are_those_of_the_built_schedule(name, ranks):
    recipe = RECIPES[name]
    if ranks % recipe.ranks_step:
        return
    chunks = recipe.virtual_stages[1] or 3
    for microbatches in (recipe.microbatches_per_rank * ranks or 2, 4 * ranks):
        schedule = build(name, ranks, microbatches, chunks)
        traits = schedule_traits(name, ranks, chunks)
        assert traits.stages_of == tuple(schedule.stages_of(rank) for rank in range(ranks))
        assert traits.mirrored == bool(schedule.mirror_rank)
        assert ways(traits.stages_of) == tuple(filter(None, (schedule.stage_rank, schedule.mirror_rank)))
        homes = [sum(stage in stages for stages in traits.stages_of) for stage in range(schedule.num_stages)]
        strategy = Strategy(pipeline_parallel=ranks, virtual_stages=chunks, schedule=name)
        assert {*homes, int(StrategyTable.of([strategy]).stage_homes[0])} == {strategy.stage_homes}
        assert traits.splits_backward >= schedule.splits_backward
        kinds = {action.kind for actions in schedule.ranks for action in actions}
        assert traits.overlaps >= (Kind.OVERLAP in kinds)
