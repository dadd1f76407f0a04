"""Ranks that were given different jobs find out before the first step."""

from __future__ import annotations

import pytest
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import PLAIN, TRAIN

from pipermoe.schedule.builders import schedule_of
from pipermoe.specs.errors import UserError
from pipermoe.specs.strategy import Strategy
from pipermoe.training.agreement import check_same_job

pytestmark = pytest.mark.distributed

STRATEGY = Strategy(pipeline_parallel=2)


def check(rank: int, key: str) -> str:
    """What this rank is told; the last one has another value of `key`."""
    other = rank == 1
    model = PLAIN.model_copy(update={"hidden_size": 32}) if other and key == "model" else PLAIN
    train = TRAIN.model_copy(update={"seq_len": 16}) if other and key == "train" else TRAIN
    strategy = STRATEGY.model_copy(update={"schedule": "gpipe"}) if other and key == "schedule" else STRATEGY
    try:
        schedule = schedule_of(strategy, train.global_batch_size)
        check_same_job(model, train, strategy, schedule, "changed" if other and key == "text" else "")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", ""),
        ("model", "the model of ranks 1 differs"),
        ("train", "the training job of"),
        ("schedule", "the strategy"),
        ("text", "the text of"),
    ],
)
def test_every_rank_is_told_what_differs(key: str, message: str):
    told = run_ranks(check, 2, key)
    assert told[0] == told[1]
    assert told[0].startswith(message)
    assert bool(told[0]) is bool(message)
