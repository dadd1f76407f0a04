"""However ranks are arranged, training is the same: losses, gradients and weights equal the run on one process."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for, job_of

from pipermoe.modules.names import is_expert
from pipermoe.modules.weight_gradients import gradient_of
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.specs.strategy import Strategy

STEPS = 3
TOLERANCE = 1e-5

pytestmark = pytest.mark.distributed


def train(rank: int, model_name: str, strategy: Strategy) -> dict:
    """A few steps; the losses of the whole batch, and this rank's first gradients and last weights by name."""
    groups = ProcessGroups.create(strategy)
    engine = engine_for(MODELS[model_name], strategy, groups, job_of(model_name))
    optimizer = Optimizer(engine.flats, TRAIN.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        result = engine.step(batch_for(strategy, groups.coordinates.dp, step))
        optimizer.reduce_gradients()
        losses_here = (result.loss, result.mtp_loss, result.auxiliary, result.z_loss)
        sums = torch.stack((*losses_here, optimizer.owned_squared_norm()))
        dist.all_reduce(sums)
        losses.append(sums[:-1].tolist())
        norms.append(sums[-1].sqrt().item())
        if step == 0 and not strategy.zero_dense:
            gradients = {name: gradient_of(parameter).clone() for name, parameter in engine.named_parameters()}
        optimizer.update(norms[-1], TRAIN.optimizer.learning_rate)
        optimizer.gather_weights()
        engine.move_correction_biases()
        optimizer.zero_gradients()
    evaluation = engine.evaluate(batch_for(strategy, groups.coordinates.dp, STEPS)).loss
    dist.all_reduce(evaluation)
    return {
        "losses": losses,
        "norms": norms,
        "evaluation": evaluation.item(),
        "gradients": gradients,
        "weights": dict(engine.named_state()),
        "ep": groups.coordinates.ep,
    }


@cache
def one_process(model_name: str, micro_batch_size: int) -> dict:
    return run_ranks(train, 1, model_name, Strategy(micro_batch_size=micro_batch_size, schedule="gpipe"))[0]


def arrangement(pp: int = 1, dp: int = 1, ep: int = 1, **options) -> Strategy:
    return Strategy(
        pipeline_parallel=pp, data_parallel=dp, expert_parallel=ep, expert_data_parallel=dp // ep, **options
    )


CASES = {
    "pp4 1f1b": ("plain", arrangement(pp=4)),
    "pp4 gpipe, tokens shared by experts": ("rich", arrangement(pp=4, schedule="gpipe")),
    "pp2 ep2 1f1b": ("rich", arrangement(pp=2, dp=2, ep=2, micro_batch_size=2)),
    "pp2 ep2 gpipe, recompute": ("sigmoid", arrangement(pp=2, dp=2, ep=2, schedule="gpipe", recompute="full")),
    "pp2 edp2": ("rich", arrangement(pp=2, dp=2, ep=1, micro_batch_size=2)),
    "ep4": ("sigmoid", arrangement(dp=4, ep=4)),
    "ep4, recompute": ("rich", arrangement(dp=4, ep=4, micro_batch_size=2, recompute="full")),
    "ep2 edp2": ("plain", arrangement(dp=4, ep=2)),
    "ep2 edp2, tied embeddings, zero 1": ("tied", arrangement(dp=4, ep=2, zero_dense=1, zero_expert=1)),
    "dp4, everything replicated": ("plain", arrangement(dp=4, ep=1)),
    "pp2 dp2 ep2, uneven split": ("rich", arrangement(pp=2, dp=2, ep=2, micro_batch_size=2, layer_split=(1, 3))),
    "pp2 ep2, latent attention, recompute": ("latent", arrangement(pp=2, dp=2, ep=2, recompute="full")),
    "ep4, groups of experts": ("grouped", arrangement(dp=4, ep=4, micro_batch_size=2)),
    "ep2 edp2, sinks and windows, zero 1": ("sinks", arrangement(dp=4, ep=2, zero_dense=1, zero_expert=1)),
    "ep4, a copy per node": ("rich", arrangement(dp=4, ep=4, dispatcher="deduplicated", ranks_per_copy=2)),
    "pp2 edp2, latent attention": ("latent", arrangement(pp=2, dp=2, ep=1, micro_batch_size=2)),
    "pp2 dp2, a pipeline inside data parallelism": (
        "rich",
        arrangement(pp=2, dp=2, ep=1, rank_order="pp-dp", zero_dense=1, zero_expert=1),
    ),
    "pp4, chunks, layer norm, plain blocks": ("older", arrangement(pp=4, recompute="full")),
}


@pytest.mark.parametrize(("model_name", "strategy"), CASES.values(), ids=list(CASES))
def test_training_equals_one_process(model_name: str, strategy: Strategy):
    expected = one_process(model_name, strategy.micro_batch_size)
    seen = set()
    for rank in run_ranks(train, strategy.world_size, model_name, strategy):
        for key in ("losses", "norms", "evaluation"):
            np.testing.assert_allclose(rank[key], expected[key], rtol=TOLERANCE, err_msg=key)
        for kind in ("gradients", "weights"):
            for name, value in rank[kind].items():
                reference = expected[kind][name]
                if is_expert(name):
                    reference = np.split(reference, strategy.expert_parallel)[rank["ep"]]
                error = np.linalg.norm(value - reference) / np.linalg.norm(reference)
                assert error < TOLERANCE, f"{kind} of {name}: relative error {error:.1e}"
        seen |= set(rank["weights"])
    assert seen == set(expected["weights"]), "every parameter is on some rank"
