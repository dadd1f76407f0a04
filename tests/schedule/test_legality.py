import numpy as np
import pytest
from tests.resources.cases import MODEL

from pipermoe.resources.peak import peak_bytes
from pipermoe.schedule.builders import illegal
from pipermoe.schedule.legality import POSSIBLE, SCHEDULE_EXISTS
from pipermoe.specs.legality import LEGAL, Job, legal_mask, violations
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

TRAIN = TrainConfig(seq_len=32, global_batch_size=12)


def every_schedule() -> StrategyTable:
    return StrategyTable.product(
        schedule=range(len(SCHEDULE_NAMES)),
        pipeline_parallel=(1, 2, 3, 4),
        virtual_stages=(1, 2, 3),
        micro_batch_size=(1, 2, 3, 4, 12),
    )


def test_the_rule_over_rows_says_what_the_builders_say_of_each():
    table = every_schedule()
    numbers = (table.pipeline_parallel, table.microbatches(12), table.virtual_stages)
    names = [SCHEDULE_NAMES[code] for code in table.schedule]
    exists = [illegal(*row) is None for row in zip(names, *(map(int, each) for each in numbers), strict=True)]
    assert SCHEDULE_EXISTS.holds(table, Job(MODEL, TRAIN, 4)).tolist() == exists
    assert 0 < sum(exists) < len(exists)


def test_what_the_rule_lets_pass_can_be_weighed():
    table = every_schedule()
    legal = table.take(legal_mask(table, MODEL, TRAIN, 2, POSSIBLE))
    assert len(legal) > 20
    assert np.all(peak_bytes(MODEL, TRAIN, legal) > 0)


def test_a_schedule_that_does_not_exist_is_refused_with_the_nearest_that_does():
    strategy = Strategy(pipeline_parallel=2, virtual_stages=3, schedule="zb-v")
    [line] = violations(strategy, MODEL, TRAIN, 2, (SCHEDULE_EXISTS,))
    assert "virtual_stages = 3" in line
    assert "nearest: 2" in line


@pytest.mark.parametrize("key", ["shared_width", "dense_width"])
def test_tensor_parallelism_divides_every_width(key):
    model = MODEL.model_copy(update={"dense_width": 126} if key == "dense_width" else {})
    if key == "shared_width":
        model = model.model_copy(update={"moe": model.moe.model_copy(update={"shared_width": 33})})
    strategy = Strategy(tensor_parallel=4, expert_data_parallel=4)
    assert any(f"must divide {key}" in line for line in violations(strategy, model, TRAIN, 4, LEGAL))
