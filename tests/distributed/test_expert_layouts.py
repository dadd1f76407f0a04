"""Wherever experts lie, and however they get there, training is the same: losses, norms, weights and both moments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, batch_for, engine_for, job_of

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.policy import Nodes
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.lay_out import LaidOut
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Mechanism, TrainConfig

pytestmark = pytest.mark.distributed

STEPS = 4
SLOTS = 8  # of a rank: room for all experts, so that any rank may be empty
MECHANISMS: tuple[Mechanism, ...] = ("bound", "decoupled", "sparse")


def random_layout(seed: int, layers: int, ranks: int, experts: int, *, copies: bool) -> ExpertLayout:
    """Every expert on a rank drawn at random, so that some ranks may have none; with `copies` some on a second one."""
    random = np.random.default_rng(seed)
    slots_LNS = np.full((layers, ranks, SLOTS), EMPTY)
    for layer in range(layers):
        for expert in random.permutation(experts):
            holders = random.choice(ranks, 1 + int(copies and random.random() < 0.5), replace=False)
            for rank in holders:
                free = np.flatnonzero(slots_LNS[layer, rank] == EMPTY)
                slots_LNS[layer, rank, free[0]] = expert
    return ExpertLayout(slots_LNS, experts)


def train(
    strategy: Strategy,
    groups: ProcessGroups,
    job: TrainConfig,
    mechanism: Mechanism | None,
    layouts: Sequence[ExpertLayout],
) -> dict:
    """A few steps, each with the next of `layouts`; without a mechanism all of them as the strategy has it."""
    laid_out = LaidOut(layouts[0], mechanism, Nodes(groups.ep.size(), 1)) if mechanism else None
    engine = engine_for(MODELS["rich"], strategy, groups, job, laid_out=laid_out)
    optimizer = Optimizer(engine.flats, job.optimizer)
    numbers = []
    for step in range(STEPS):
        result = engine.step(batch_for(strategy, groups.coordinates.dp, step))
        optimizer.reduce_gradients()
        sums = torch.stack([optimizer.owned_squared_norm(), result.loss, result.auxiliary, result.dropped])
        dist.all_reduce(sums)
        numbers.append(sums.tolist())
        optimizer.update(sums[0].sqrt().item(), job.optimizer.learning_rate)
        if engine.placement is not None:
            optimizer.adopt(engine.placement.adopt(layouts[(step + 1) % len(layouts)]))
        optimizer.gather_weights()
        optimizer.zero_gradients()
    parts = [(part.kind, part.span.name, part.span.start, part.values.clone()) for part in optimizer.owned_parts()]
    return {"numbers": numbers, "parts": parts}


def run(rank: int, strategy: Strategy, job: TrainConfig, mechanisms: Sequence[Mechanism], layouts) -> list[dict]:
    groups = ProcessGroups.create(strategy)
    return [train(strategy, groups, job, mechanism, layouts) for mechanism in (None, *mechanisms)]


def whole(ranks: Sequence[dict]) -> dict[tuple[str, str], NDArray]:
    """Every vector of the model's and the optimizer's state, put together from the parts of all ranks."""
    parts: dict[tuple[str, str], dict[int, NDArray]] = {}
    for rank in ranks:
        for kind, name, start, values in rank["parts"]:
            starts = parts.setdefault((kind, name), {})
            assert start not in starts, f"{kind} of {name}: element {start} is on two ranks"
            starts[start] = values
    return {key: np.concatenate([values for _, values in sorted(starts.items())]) for key, starts in parts.items()}


def check_equal(results: list[list[dict]], which: int, *, bitwise: bool, where: str) -> None:
    for rank in results:
        if bitwise:  # but the norm, whose squares are added in the order of slots
            assert [step[1:] for step in rank[which]["numbers"]] == [step[1:] for step in rank[0]["numbers"]], where
        np.testing.assert_allclose(rank[which]["numbers"], rank[0]["numbers"], rtol=1e-5, atol=1e-12, err_msg=where)
    static, moved = (whole([rank[i] for rank in results]) for i in (0, which))
    assert moved.keys() == static.keys()
    for key, expected in static.items():
        if bitwise:
            np.testing.assert_array_equal(moved[key], expected, err_msg=f"{key}, {where}")
        else:
            error = np.linalg.norm(moved[key] - expected) / max(np.linalg.norm(expected), 1e-12)
            assert error < 1e-5, f"{key}, {where}: relative error {error:.1e}"


UNCLIPPED = job_of("rich").model_copy(
    update={"optimizer": job_of("rich").optimizer.model_copy(update={"gradient_clip": 0.0})}
)


def test_moving_whole_experts_changes_nothing_at_all_on_four_ranks():
    strategy = Strategy(data_parallel=4, expert_parallel=4)
    layouts = [random_layout(seed, 3, 4, 8, copies=False) for seed in range(3)]
    assert any((layout.slots_LNS == EMPTY).all(2).any() for layout in layouts), "some rank is empty"
    results = run_ranks(run, 4, strategy, UNCLIPPED, MECHANISMS, layouts)
    for i, mechanism in enumerate(MECHANISMS, 1):
        check_equal(results, i, bitwise=mechanism != "sparse", where=mechanism)


def test_copies_share_an_experts_rows_and_sum_its_gradients():
    strategy = Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2)
    layouts = [random_layout(seed, 3, 2, 8, copies=True) for seed in range(3)]
    results = run_ranks(run, 4, strategy, job_of("rich"), MECHANISMS, layouts)
    for i, mechanism in enumerate(MECHANISMS, 1):
        check_equal(results, i, bitwise=False, where=mechanism)
