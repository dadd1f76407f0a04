"""An embedding that both ends of the pipeline hold: multi-token prediction and tied heads train as on one process."""

from __future__ import annotations

import numpy as np
import pytest
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import TOLERANCE, arrangement, one_process, train
from tests.distributed.test_sharding import sharded

from pipermoe.modules.names import EMBEDDING, is_expert
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed

# Strategies by model, each list on one world of four ranks.
STRATEGIES = {
    "predicting": [
        arrangement(pp=4),
        arrangement(pp=2, dp=2, ep=2, schedule="zb-h1", recompute="full", zero_dense=1, zero_expert=1),
        arrangement(pp=2, dp=2, ep=2, schedule="dualpipe-v", virtual_stages=2, dispatcher="deduplicated"),
        sharded(2, 2, "interleaved-1f1b", 2, pp=2, dp=2),
        sharded(3, 3, "zb-v", 2, pp=2, dp=2, recompute="selective", recompute_modules=("norm", "attention")),
        sharded(3, 2, "zb-h2-overlap", pp=2, dp=2, ep=2),
        sharded(2, 3, "dualpipe", pp=2, dp=2, ep=2),
    ],
    "tied": [
        arrangement(pp=4, schedule="zb-h2"),
        sharded(1, 1, "zb-v", 2, pp=2, dp=2),
        sharded(3, 3, pp=2, dp=2, ep=2),
        sharded(1, 1, "dualpipe", pp=4),
    ],
}


def train_all(rank: int, model: str, strategies: list[Strategy]) -> list[dict]:
    return [train(rank, model, strategy) for strategy in strategies]


@pytest.mark.parametrize("model", STRATEGIES)
def test_training_equals_one_process_and_both_ends_stay_equal(model: str):
    strategies, expected = STRATEGIES[model], one_process(model, 1)
    ranks = run_ranks(train_all, 4, model, strategies)
    for i, strategy in enumerate(strategies):
        copies = set()
        for rank, results in enumerate(ranks):
            result, where = results[i], f"rank {rank} of {strategy.compact()} {strategy.schedule}"
            for key in ("losses", "norms", "evaluation"):
                np.testing.assert_allclose(result[key], expected[key], rtol=TOLERANCE, err_msg=f"{key}, {where}")
            for name, value in result["weights"].items():
                wanted = expected["weights"][name]
                wanted = np.split(wanted, strategy.expert_parallel)[result["ep"]] if is_expert(name) else wanted
                error = np.linalg.norm(value - wanted) / np.linalg.norm(wanted)
                assert error < TOLERANCE, f"{name}, {where}: relative error {error:.1e}"
            if EMBEDDING in result["weights"]:
                copies.add(result["weights"][EMBEDDING].tobytes())
        assert len(copies) == 1
