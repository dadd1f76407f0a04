"""bf16 with fp32 masters: what one process trains is what every arrangement trains, and stays close to fp32."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import arrangement
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.specs.precision import Precision
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed
STEPS = 10
# bf16 keeps 8 bits: one rounding is off by at most 2^-9 = 0.2 %. A loss of about ln 37 passes some dozens of them.
TOLERANCE = 0.01


def train(rank: int, strategy: Strategy, precision: Precision) -> dict:
    """Losses of the whole batch over a few steps on one batch, and what this rank keeps of its weights."""
    groups = ProcessGroups.create(strategy)
    job = TRAIN.model_copy(update={"precision": precision})
    engine = engine_for(MODELS["rich"], strategy, groups, job)
    optimizer = Optimizer(engine.flats, job.optimizer)
    losses = []
    for _ in range(STEPS):
        result = engine.step(batch_for(strategy, groups.coordinates.dp, 0))
        optimizer.reduce_gradients()
        sums = torch.stack((result.loss.double(), optimizer.owned_squared_norm()))
        dist.all_reduce(sums)
        losses.append(sums[0].item())
        optimizer.update(sums[1].sqrt().item(), job.optimizer.learning_rate)
        optimizer.gather_weights()
        optimizer.zero_gradients()
    masters = [(state.weights, state.flat.of_updated(state.flat.weights)) for state in optimizer.states]
    return {
        "losses": losses,
        "dtypes": [(str(exact.dtype), str(rounded.dtype)) for exact, rounded in masters],
        "rounded": all(torch.equal(exact.to(rounded.dtype), rounded) for exact, rounded in masters),
    }


@cache
def one_process(precision: Precision) -> dict:
    return run_ranks(train, 1, Strategy(micro_batch_size=2), precision)[0]


def test_the_loss_falls_as_it_does_in_fp32():
    bf16, fp32 = one_process("bf16")["losses"], one_process("fp32")["losses"]
    assert bf16 == pytest.approx(fp32, rel=TOLERANCE)
    assert fp32[-1] < fp32[0] - 1


def test_masters_are_fp32_and_weights_are_their_rounding():
    run = one_process("bf16")
    assert set(run["dtypes"]) == {("torch.float32", "torch.bfloat16")}
    assert run["rounded"]


@pytest.mark.parametrize(
    "strategy",
    [
        arrangement(pp=2, dp=2, ep=2, schedule="zb-h1", zero_dense=3, micro_batch_size=2),
        arrangement(dp=4, ep=2, zero_dense=2, zero_expert=2, recompute="full", micro_batch_size=2),
    ],
    ids=lambda strategy: strategy.compact(),
)
def test_arrangements_train_alike(strategy: Strategy):
    expected = one_process("bf16")["losses"]
    for rank in run_ranks(train, strategy.world_size, strategy, "bf16"):
        assert rank["losses"] == pytest.approx(expected, rel=TOLERANCE)
        assert rank["rounded"]
