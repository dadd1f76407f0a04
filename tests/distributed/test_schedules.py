"""The engine executes what a schedule says: split backward, several stages on a rank, V shapes; gradients are equal."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, batch_for, engine_for, job_of, reduced_gradients

from pipermoe.modules.names import is_expert
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.errors import MachineError
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed


# Split backward, several stages on a rank, V shapes, pairs; name -> (stages on a rank, model).
SCHEDULES = {
    "breadth-first": (2, "rich"),
    "interleaved-1f1b": (2, "rich"),
    "zb-h1": (1, "sinks"),
    "zb-h2-overlap": (1, "rich"),
    "zb-v": (2, "latent"),
    "zb-v-overlap": (2, "rich"),
    "v-min": (2, "rich"),
    "dualpipe": (1, "rich"),
    "dualpipe-v": (2, "grouped"),
}


def gradients(rank: int, model: str, strategy: Strategy) -> dict:
    groups = ProcessGroups.create(strategy)
    engine = engine_for(MODELS[model], strategy, groups, job_of(model))
    result = engine.step(batch_for(strategy, groups.coordinates.dp, 0))
    dist.all_reduce(result.loss)
    return {"loss": result.loss, "ep": groups.coordinates.ep, "gradients": reduced_gradients(engine)}


def gradients_of_one_process(rank: int, model: str) -> dict:
    strategy = Strategy()
    engine = engine_for(MODELS[model], strategy, ProcessGroups.create(strategy), job_of(model))
    loss = engine.step(batch_for(strategy, 0, 0)).loss
    return {"loss": loss, "gradients": reduced_gradients(engine)}


@cache
def expected(model: str) -> dict:
    return run_ranks(gradients_of_one_process, 1, model)[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_equal_one_process(name: str):
    virtual_stages, model = SCHEDULES[name]
    strategy = Strategy(
        pipeline_parallel=2,
        data_parallel=2,
        expert_parallel=2,
        schedule=name,
        virtual_stages=virtual_stages,
        recompute="full" if name == "zb-v" else "none",
    )
    reference = expected(model)
    for rank in run_ranks(gradients, 4, model, strategy):
        np.testing.assert_allclose(rank["loss"], reference["loss"], rtol=1e-5)
        for parameter, value in rank["gradients"].items():
            wanted = reference["gradients"][parameter]
            wanted = np.split(wanted, 2)[rank["ep"]] if is_expert(parameter) else wanted
            assert np.linalg.norm(value - wanted) < 1e-5 * np.linalg.norm(wanted), parameter


def fail_in_the_second_microbatch(rank: int) -> str:
    """Token 999 does not exist; both ranks hold it, the first looks it up, so only that one fails."""
    strategy = Strategy(pipeline_parallel=2)
    engine = engine_for(MODELS["plain"], strategy, ProcessGroups.create(strategy))
    batch = batch_for(strategy, 0, 0).clone()
    batch[1, 0, 3] = 999
    if rank == 1:
        return ""
    with pytest.raises(MachineError) as caught:
        engine.step(batch)
    return str(caught.value)


def test_an_error_names_rank_action_and_microbatch():
    message = run_ranks(fail_in_the_second_microbatch, 2)[0]
    assert message.startswith("rank 0: action 0F1 (stage 0, micro-batch 1) failed: IndexError: ")


def test_tensors_of_one_step_do_not_outlive_it():
    assert run_ranks(storages_after_a_step, 2) == [0, 0]


def storages_after_a_step(rank: int) -> int:
    """How many float tensors a second step leaves behind."""
    import gc

    strategy = Strategy(pipeline_parallel=2)
    engine = engine_for(MODELS["rich"], strategy, ProcessGroups.create(strategy))
    batch = batch_for(strategy, 0, 0)
    engine.step(batch)

    def floats() -> int:
        gc.collect()
        return sum(1 for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.is_floating_point())

    before = floats()
    engine.step(batch)
    return floats() - before
