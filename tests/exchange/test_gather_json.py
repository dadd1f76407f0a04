"""Values of different lengths reach every rank, in rank order."""

import pytest
import torch.distributed as dist
from tests.distributed.harness import run_ranks

from pipermoe.exchange.executor.gather_json import all_gather_json

MESSAGES = [{"name": "größer", "bytes": 2**53}, [], "x" * 1000]


def gather(rank: int) -> list:
    assert dist.group.WORLD is not None
    return all_gather_json(MESSAGES[rank], dist.group.WORLD)


@pytest.mark.distributed
def test_every_rank_gets_every_message_in_rank_order():
    assert run_ranks(gather, 3) == [MESSAGES] * 3
