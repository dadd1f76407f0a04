"""What is counted as memory does not depend on when a backend lets go of a collective's buffers.

Gloo's threads hold the tensors of a collective for an instant after it ended, longer on a busy machine. Here they are
held until two more collectives have begun: the counts must stay those of a backend that lets go at once.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from tests.distributed.test_dry_run import BALANCED_CASES, BALANCES, CASES
from tests.runtime.tiny import MODELS, TRAIN
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.runtime.counters import TrafficCounter
from pipermoe.specs.footprint import Footprint
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

AT_ONCE = ("send", "recv_")  # point to point has no thread: whoever waits for it holds the only reference


def footprints(model: str, text: str, routing: str, train: TrainConfig = TRAIN) -> list[Footprint]:
    strategy = Strategy.parse(text)
    return [dry_run(MODELS[model], train, strategy, rank=rank, routing=routing) for rank in (0, 3)]


@pytest.fixture
def linger(monkeypatch: pytest.MonkeyPatch) -> Any:
    """To be called: from then on the two newest collectives hold their tensors."""
    held: deque[list[Tensor]] = deque(maxlen=2)
    observe = TrafficCounter.observe

    def holding(self: TrafficCounter, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.namespace == "c10d" and func._schema.name.removeprefix("c10d::") not in AT_ONCE:
            held.append([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
        observe(self, func, args, kwargs, result)

    return lambda: monkeypatch.setattr(TrafficCounter, "observe", holding)


@pytest.mark.parametrize(("model", "text", "routing"), CASES)
def test_lingering_buffers_are_counted_as_if_they_went_at_once(model: str, text: str, routing: str, linger: Any):
    expected = footprints(model, text, routing)
    linger()
    assert footprints(model, text, routing) == expected


@pytest.mark.parametrize(("balance", "text"), BALANCED_CASES)
def test_so_are_those_of_a_job_that_moves_experts(balance: str, text: str, linger: Any):
    train = TRAIN.model_copy(update={"balance": BALANCES[balance]})
    expected = footprints("rich", text, "lognormal:max=1.8", train)
    linger()
    assert footprints("rich", text, "lognormal:max=1.8", train) == expected
