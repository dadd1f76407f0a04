"""Sharded gradients and weights (ZeRO-2 and ZeRO-3) train as one process does, under every kind of schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import arrangement, one_process, train
from tests.runtime.tiny import MODELS, batch_for, engine_for, job_of

from pipermoe.modules.names import is_expert
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.sharding import with_gathered_weights, with_reduction
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed


def sharded(zero_dense: int, zero_expert: int, schedule: str = "1f1b", virtual_stages: int = 1, **options) -> Strategy:
    levels = {"zero_dense": zero_dense, "zero_expert": zero_expert}
    return arrangement(**options, schedule=schedule, virtual_stages=virtual_stages, **levels)


# Strategies by model, each list on one world of four ranks.
STRATEGIES = {
    "rich": [
        sharded(3, 3, "zb-h2-overlap", pp=2, dp=2),
        sharded(2, 3, "interleaved-1f1b", 2, pp=2, dp=2, micro_batch_size=1),
        sharded(3, 1, "dualpipe-v", 2, pp=2, dp=2, ep=2),
        sharded(3, 3, "dualpipe", pp=4, recompute="full"),
    ],
    "latent": [
        sharded(3, 3, "zb-v", 2, pp=2, dp=2, recompute="full"),
        sharded(2, 2, "v-min", 2, pp=2, dp=2),
        sharded(3, 2, "gpipe", dp=4, ep=2),
    ],
    "tied": [sharded(3, 3, dp=4, ep=2), sharded(2, 2, dp=4, ep=1)],
    "sinks": [sharded(2, 2, "zb-h1", pp=2, dp=2), sharded(3, 0, "breadth-first", 2, pp=2, dp=2)],
}


def train_all(rank: int, model: str, strategies: list[Strategy]) -> list[dict]:
    return [train(rank, model, strategy) for strategy in strategies]


@pytest.mark.parametrize("model", STRATEGIES)
def test_training_equals_one_process(model: str):
    strategies = STRATEGIES[model]
    expected = one_process(model, 1)
    for rank, results in enumerate(run_ranks(train_all, 4, model, strategies)):
        for strategy, result in zip(strategies, results, strict=True):
            where = f"rank {rank} of {strategy.compact()} {strategy.schedule}"
            for key in ("losses", "norms", "evaluation"):
                np.testing.assert_allclose(result[key], expected[key], rtol=1e-5, err_msg=f"{key}, {where}")
            for name, value in result["weights"].items():
                wanted = expected["weights"][name]
                wanted = np.split(wanted, strategy.expert_parallel)[result["ep"]] if is_expert(name) else wanted
                error = np.linalg.norm(value - wanted) / np.linalg.norm(wanted)
                assert error < 1e-5, f"{name}, {where}: relative error {error:.1e}"


def weights_between_steps(rank: int) -> tuple[bool, int, int]:
    """Whether all parameters read as NaN, floats of weights and gradients kept, floats a rank would keep unsharded."""
    strategy = sharded(3, 3, dp=2)
    engine = engine_for(MODELS["rich"], strategy, ProcessGroups.create(strategy))
    engine.step(batch_for(strategy, engine.groups.coordinates.dp, 0))
    gone = all(torch.isnan(parameter).all().item() for _, parameter in engine.named_parameters())
    kept = sum(flat.weights.untyped_storage().nbytes() + flat.gradients.nbytes for flat in engine.flats)
    return gone, kept // 4, 2 * sum(math.prod(parameter.shape) for _, parameter in engine.named_parameters())


def test_between_steps_a_rank_keeps_its_shards_alone():
    for gone, kept, whole in run_ranks(weights_between_steps, 2):
        assert gone
        assert whole <= 2 * kept < whole * 1.01  # shards are padded to equal lengths


def with_sharding_actions(rank: int) -> tuple[list[bytes], list[bytes]]:
    """The shards of a step's gradients by a plain schedule, and by one that says when to gather and to reduce."""
    strategy = sharded(3, 3, "interleaved-1f1b", 2, pp=2, dp=2)
    groups, train, found = ProcessGroups.create(strategy), job_of("rich"), []
    plain = with_communication(schedule_of(strategy, train.global_batch_size))
    for schedule in (plain, with_gathered_weights(with_reduction(plain))):
        engine = Engine(MODELS["rich"], train, strategy, schedule, groups)
        engine.step(batch_for(strategy, groups.coordinates.dp, 0))
        found.append([flat.gradients.numpy().tobytes() for flat in engine.flats])
    return found[0], found[1]


def test_a_schedule_that_says_when_to_gather_and_reduce_gives_the_same_gradients():
    for plain, told in run_ranks(with_sharding_actions, 4):
        assert plain == told
