"""One rank of the same program, under fake tensors and the fake process group, counts what the real run counts."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.distributed.test_counters import CASES, count
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

NAMES = ["pp2 ep2", "ep4, recompute"]

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("model_name", "strategy"), [CASES[name] for name in NAMES], ids=NAMES)
def test_a_dry_run_counts_the_bytes_and_flops_of_the_real_run(model_name: str, strategy):
    real = run_ranks(count, strategy.world_size, model_name, strategy, True)
    for rank in (0, strategy.world_size - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=strategy.world_size)
        try:
            with FakeTensorMode():
                fake = count(rank, model_name, strategy, True)
        finally:
            dist.destroy_process_group()
        assert fake["flops"] == real[rank]["flops"]
        assert fake["traffic"] == real[rank]["traffic"]
        assert fake["memory"] == real[rank]["memory"]
