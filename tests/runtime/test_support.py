"""What the runtime cannot do is refused in a sentence, and weights do not depend on who draws them."""

from __future__ import annotations

import pytest
import torch
from tests.runtime.tiny import PLAIN, TRAIN

from pipermoe.modules.initialize import initialize
from pipermoe.runtime.support import check_supported
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import GroupedQueryAttention, Indexer, LatentAttention
from pipermoe.specs.strategy import Strategy

ODD = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=3)
SELECTING = LatentAttention(
    num_heads=2,
    q_lora_rank=4,
    kv_lora_rank=4,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=2,
    indexer=Indexer(num_heads=1, head_dim=2, top_k=2),
)


@pytest.mark.parametrize(
    ("change", "strategy", "message"),
    [
        ({}, Strategy(tensor_parallel=2, expert_data_parallel=2), "strategy.tensor_parallel = 2: "),
        ({}, Strategy(pipeline_parallel=2, schedule="zb-v"), "virtual_stages = 1: zb-v needs exactly 2"),
        ({}, Strategy(schedule="zb"), "schedule = 'zb': unknown"),
        ({"norms_per_layer": 4}, Strategy(), "norms_per_layer = 4: "),
        ({"attention": ODD}, Strategy(), "attention.head_dim = 3: "),
        ({"attention": SELECTING}, Strategy(), "attention.indexer = "),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(change: dict, strategy: Strategy, message: str):
    with pytest.raises(UserError) as caught:
        check_supported(PLAIN.model_copy(update=change), TRAIN, strategy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_experts_are_the_same_whichever_rank_draws_them():
    name = "layers.3.experts.down.weight"
    whole, half = torch.empty(4, 3, 5), torch.empty(2, 3, 5)
    initialize([(name, whole)], seed=7, num_layers=4)
    initialize([(name, half)], seed=7, num_layers=4, experts_of=lambda name: range(2, 4))
    assert torch.equal(whole[2:], half)
    assert not torch.equal(whole[0], whole[1])
