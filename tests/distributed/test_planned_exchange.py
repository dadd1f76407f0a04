"""Whoever moves the bytes, training is the same to the bit, and so is what is counted."""

import numpy as np
import pytest
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import arrangement, train
from tests.runtime.tiny import MODELS, batch_for, engine_for, job_of, reduced_gradients

from pipermoe.runtime.counters import TrafficCounter
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed
ARRANGEMENTS = {
    "ep4": arrangement(dp=4, ep=4),
    "ep4, a copy per node, recompute": arrangement(
        dp=4, ep=4, dispatcher="deduplicated", ranks_per_copy=2, recompute="full"
    ),
    "pp2 ep2, recompute, overlap": arrangement(pp=2, dp=2, ep=2, schedule="1f1b-overlap", recompute="full"),
}


@pytest.mark.parametrize("strategy", ARRANGEMENTS.values(), ids=list(ARRANGEMENTS))
def test_training_over_exchange_plans_is_bitwise_equal_to_the_library(strategy: Strategy):
    library = run_ranks(train, 4, "rich", strategy)
    planned = run_ranks(train, 4, "rich", strategy.model_copy(update={"exchange": "planned"}))
    for rank, (expected, found) in enumerate(zip(library, planned, strict=True)):
        assert found["losses"] == expected["losses"], rank
        assert found["norms"] == expected["norms"], rank
        for kind in ("gradients", "weights"):
            for name, value in expected[kind].items():
                assert np.array_equal(found[kind][name], value), (rank, kind, name)


def traffic(rank: int, strategy: Strategy) -> dict:
    groups = ProcessGroups.create(strategy)
    engine = engine_for(MODELS["rich"], strategy, groups, job_of("rich"))
    counter = TrafficCounter()
    engine.meter.on_exchange = counter.count_all_to_all
    with counter:
        engine.step(batch_for(strategy, groups.coordinates.dp, 0))
        reduced_gradients(engine)
    return {key: (found.calls, found.bytes) for key, found in counter.traffic.items()}


def test_exchange_plans_count_as_the_librarys_all_to_all():
    strategy = arrangement(dp=2, ep=2)
    library, planned = (
        run_ranks(traffic, 2, strategy.model_copy(update={"exchange": way})) for way in ("library", "planned")
    )
    assert "all_to_all.ep" in library[0]
    assert planned == library
