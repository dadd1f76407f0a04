import numpy as np
import pytest
from tests.resources.cases import MODEL, machine

from pipermoe.resources.compute import (
    AttentionCore,
    Gemm,
    GroupedGemm,
    Stream,
    attention_work,
    dense_work,
    head_work,
    moe_work,
    seconds,
    stage_flops,
    stage_seconds,
)
from pipermoe.resources.flops import head_forward_flops, layer_forward_flops
from pipermoe.resources.rates import rate_at
from pipermoe.resources.stages import stage_shapes
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.device import RateCurve

DEVICE = machine().device


def flops_of(works) -> float:
    return sum(work.flops * getattr(work, "count", 1) for work in works if not isinstance(work, Stream))


@pytest.mark.parametrize("layer", [0, 1])
def test_the_operations_of_a_layer_add_up_to_its_flops(layer):
    block = moe_work(MODEL, 64, 4) if MODEL.is_moe(layer) else dense_work(MODEL, 64)
    expected = layer_forward_flops(MODEL, layer, tokens=64, seq_len=32, causal=False).total
    assert flops_of(attention_work(MODEL, 64, 32)) + flops_of(block) == expected


def test_the_operations_of_the_head_add_up_to_its_flops():
    assert flops_of(head_work(MODEL, 64)) == head_forward_flops(MODEL, 64)


def test_a_rate_is_linear_in_the_logarithm_of_the_size_and_constant_beyond_the_ends():
    curve = RateCurve(size=(1.0, 100.0), rate=(10.0, 30.0))
    assert rate_at(curve, np.array([0.01, 1.0, 10.0, 100.0, 1e6])).tolist() == pytest.approx([10, 10, 20, 30, 30])


def test_each_kind_of_work_is_priced_by_its_own_curve():
    assert seconds(Gemm(4e6, count=2), DEVICE, "fp32") == pytest.approx((2e-4, 4e-4))  # above 1 MFLOP: 40 GFLOP/s
    assert seconds(GroupedGemm(4e6, 128, 64), DEVICE, "fp32") == pytest.approx((2e-4, 4e-4))  # many rows: 20 GFLOP/s
    assert seconds(AttentionCore(1e6, 32), DEVICE, "fp32") == pytest.approx((1e-4, 2.5e-4))  # 10 and 8 GFLOP/s
    assert seconds(Stream("norm", 1e6), DEVICE, "fp32") == pytest.approx((1e-3, 2e-3))  # measured elements/s


def test_a_pass_without_a_measured_rate_streams_its_bytes_and_pays_one_launch():
    forward, backward = seconds(Stream("residual", 1e6), DEVICE, "fp32")
    assert forward == pytest.approx(3 * 4e6 / 5e9 + 1e-6)
    assert backward == pytest.approx(1 * 4e6 / 5e9 + 1e-6)


def test_rows_are_sorted_by_expert_only_where_several_experts_receive_from_several_ranks():
    def permutes(experts_per_rank):
        works = moe_work(MODEL, 64, experts_per_rank)
        return next(work.count for work in works if isinstance(work, Stream) and work.name == "permute")

    assert [permutes(8), permutes(4), permutes(1)] == [2, 4, 2]  # one rank, two ranks, an expert for each rank


def test_stages_without_the_head_cost_what_their_layers_cost():
    shapes = stage_shapes(MODEL, 3)
    tokens, ones = np.array([64]), np.array([4])
    forward, backward = stage_seconds(MODEL, DEVICE, "fp32", shapes, tokens, 32, ones, np.array([0]))
    per_moe_layer = forward[0, 1] / 2
    whole, _ = stage_seconds(MODEL, DEVICE, "fp32", stage_shapes(MODEL, 1), tokens, 32, ones, np.array([0]))
    assert whole[0, 0] == pytest.approx(forward.sum())
    assert forward[0, 2] > 2 * per_moe_layer  # the head is on the last stage
    assert (backward > forward).all()


def test_full_recompute_repeats_the_forward_of_the_layers_but_not_of_the_head():
    layers = range(2, 4)
    once = sum(layer_forward_flops(MODEL, n, tokens=64, seq_len=32, causal=False).total for n in layers)
    head = head_forward_flops(MODEL, 64)
    none, full = (stage_flops(MODEL, layers, has_head=True, tokens=64, seq_len=32, full=repeat) for repeat in (0, 1))
    assert none == 3 * once + 3 * head
    assert full == 4 * once + 3 * head


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "gpt-oss-120b", "qwen3-30b-a3b"])
def test_the_products_of_attention_are_those_that_are_counted(name):
    model = load_model(name)
    works = attention_work(model, 64, 256)
    counts = [layer_forward_flops(model, n, tokens=64, seq_len=256, causal=False) for n in range(model.num_layers)]
    assert sum(work.flops * work.count for work in works if isinstance(work, Gemm)) == counts[0].attention_projections
    core = sum(work.flops for work in works if isinstance(work, AttentionCore))
    assert core == pytest.approx(sum(count.attention_core for count in counts) / model.num_layers)
