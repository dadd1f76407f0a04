"""The load of the global batch is that of all data-parallel ranks together, and of the micro-batches so far."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for, reduced_gradients

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed

GLOBALLY = TRAIN.model_copy(update={"auxiliary_loss_level": "global_batch"})
SPREAD = Strategy(data_parallel=2, expert_parallel=2)
MIRRORED = Strategy(pipeline_parallel=2, schedule="dualpipe")


def router_gradients(rank: int, strategy: Strategy, recompute: str, spread: Strategy) -> dict:
    """The auxiliary loss of a step and the routers' gradients; a single process takes side by side what `spread` takes
    at the same time: the halves of two ranks, or the micro-batches that come from either end.
    """
    strategy = strategy.model_copy(update={"recompute": recompute})
    groups = ProcessGroups.create(strategy)
    engine = engine_for(MODELS["latent"], strategy, groups, GLOBALLY)
    if groups.world.size() == 1:
        halves = [batch_for(SPREAD, dp, 0) for dp in range(2)]
        if spread == MIRRORED:
            halves = [batch_for(MIRRORED, 0, 0)[flow::2] for flow in range(2)]
        batch = torch.cat(halves, dim=1)
    else:
        batch = batch_for(strategy, groups.coordinates.dp, 0)
    auxiliary = engine.step(batch).auxiliary
    routers = {name: each for name, each in reduced_gradients(engine).items() if name.endswith("router.weight")}
    dist.all_reduce(auxiliary)
    engine.move_correction_biases()
    biases = {name: each for name, each in engine.named_state() if name.endswith("correction_bias")}
    return {"auxiliary": auxiliary, **routers, **biases}


@pytest.mark.parametrize(("spread", "recompute"), [(SPREAD, "none"), (SPREAD, "full"), (MIRRORED, "none")])
def test_two_ranks_see_the_load_that_one_process_sees(spread: Strategy, recompute: str):
    (expected,) = run_ranks(router_gradients, 1, Strategy(micro_batch_size=2), recompute, spread)
    for rank in run_ranks(router_gradients, 2, spread, recompute, spread):
        assert rank.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(rank[name], value, rtol=1e-4, atol=1e-7, err_msg=name)
