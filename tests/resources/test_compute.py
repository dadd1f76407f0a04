import numpy as np
import pytest
from tests.resources.cases import MODEL, machine

from pipermoe.resources.activations.sizes import Recompute, Sizes
from pipermoe.resources.compute import (
    AttentionCore,
    Cast,
    Gemm,
    GroupedGemm,
    Stream,
    attention_inside,
    attention_work,
    dense_work,
    expert_work,
    head_work,
    layer_seconds,
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
from pipermoe.specs.model import ModelSpec

DEVICE = machine().device


def sizes(model: ModelSpec = MODEL, tp: int = 1, ep: int = 1, etp: int = 1) -> Sizes:
    """64 tokens in sequences of 32."""
    return Sizes(model, 4, np.array([64]), seq_len=32, tp=np.array([tp]), ep=np.array([ep]), etp=np.array([etp]))


def pair(work) -> tuple[float, float]:
    """Forward and whole backward."""
    found = seconds(work, DEVICE, "fp32")
    return found.forward, found.input_grad + found.weight_grad


def flops_of(works) -> float:
    return sum(work.flops * getattr(work, "count", 1) for work in works if not isinstance(work, Stream | Cast))


@pytest.mark.parametrize("layer", [0, 1])
def test_the_operations_of_a_layer_add_up_to_its_flops(layer):
    block = moe_work(sizes(ep=2)) if MODEL.is_moe(layer) else dense_work(sizes())
    expected = layer_forward_flops(MODEL, layer, tokens=64, seq_len=32, causal=False).total
    assert flops_of(attention_work(sizes())) + flops_of(block) == expected


def test_the_operations_of_the_head_add_up_to_its_flops():
    assert flops_of(head_work(sizes())) == head_forward_flops(MODEL, 64)


def test_a_rate_is_linear_in_the_logarithm_of_the_size_and_constant_beyond_the_ends():
    curve = RateCurve(size=(1.0, 100.0), rate=(10.0, 30.0))
    assert rate_at(curve, np.array([0.01, 1.0, 10.0, 100.0, 1e6])).tolist() == pytest.approx([10, 10, 20, 30, 30])


def test_each_kind_of_work_is_priced_by_its_own_curve():
    assert pair(Gemm(4e6, count=2)) == pytest.approx((2e-4, 4e-4))  # above 1 MFLOP: 40 GFLOP/s
    assert pair(GroupedGemm(4e6, 128, 64)) == pytest.approx((2e-4, 4e-4))  # many rows: 20 GFLOP/s
    assert pair(AttentionCore(1e6, 32, 128)) == pytest.approx((1e-4, 2.5e-4))  # 10 and 8 GFLOP/s
    assert pair(Stream("norm", 1e6)) == pytest.approx((1e-3, 2e-3))  # measured elements/s


def test_a_pass_without_a_measured_rate_streams_its_bytes_and_pays_one_launch():
    forward, backward = pair(Stream("residual", 1e6))
    assert forward == pytest.approx(3 * 4e6 / 5e9 + 1e-6)
    assert backward == pytest.approx(1 * 4e6 / 5e9 + 1e-6)


def test_heads_of_another_size_run_at_their_share_of_the_rate():
    shares = RateCurve(size=(64, 128), rate=(0.5, 1.0))
    device = DEVICE.model_copy(update={"attention_head_sizes": shares})
    small, usual = (seconds(AttentionCore(1e6, 32, size), device, "fp32") for size in (64, 128))
    assert (small.forward, small.input_grad) == pytest.approx((2 * usual.forward, 2 * usual.input_grad))
    assert usual.forward == pytest.approx(1e-4)


def test_padded_values_take_time_only_on_a_device_that_pads_them():
    narrow = AttentionCore(1e6, 32, 128, padding=0.5e6)
    takes_both, pads = (seconds(narrow, DEVICE.model_copy(update={"pads_values": pads}), "fp32") for pads in (0, 1))
    assert takes_both.forward == pytest.approx(1e-4)
    assert (pads.forward, pads.input_grad) == pytest.approx((1.5e-4, 1.5 * 2.5e-4))


def test_only_products_in_fp8_cast_what_they_read():
    cast = Cast(inputs=1e6, gradients=2e6)
    assert pair(cast) == (0.0, 0.0)
    found = seconds(cast, DEVICE, "fp8")  # 2 bytes read, one written for each direction, at 5 GB/s, and a launch
    assert (found.forward, found.input_grad) == pytest.approx((4e6 / 5e9 + 1e-6, 8e6 / 5e9 + 1e-6))


def test_rows_are_sorted_by_expert_only_where_several_experts_receive_from_several_ranks():
    def permutes(ep):
        works = moe_work(sizes(ep=ep))
        return sum(int(np.max(w.count)) for w in works if isinstance(w, Stream) and w.name == "permute")

    assert [permutes(1), permutes(2), permutes(8)] == [2, 4, 2]  # one rank, two ranks, an expert for each rank


def test_stages_without_the_head_cost_what_their_layers_cost():
    layers = layer_seconds(DEVICE, "fp32", sizes(ep=2), Recompute())
    found = stage_seconds(layers, stage_shapes(MODEL, 3))
    per_moe_layer = found.forward[0, 1] / 2
    whole = stage_seconds(layers, stage_shapes(MODEL, 1))
    assert whole.forward[0, 0] == pytest.approx(found.forward.sum())
    assert found.forward[0, 2] > 2 * per_moe_layer  # the head is on the last stage
    assert (found.input_grad + found.weight_grad > found.forward).all()


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "gpt-oss-120b", "qwen3-30b-a3b"])
def test_the_products_of_attention_are_those_that_are_counted(name):
    model = load_model(name)
    works = attention_work(Sizes(model, 2, np.array([64]), seq_len=256))
    counts = [layer_forward_flops(model, n, tokens=64, seq_len=256, causal=False) for n in range(model.num_layers)]
    assert sum(work.flops * work.count for work in works if isinstance(work, Gemm)) == counts[0].attention_projections
    core = sum(work.flops + work.padding for work in works if isinstance(work, AttentionCore))
    assert core == pytest.approx(sum(count.attention_core for count in counts) / model.num_layers)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-30b-a3b"])
def test_tensor_parallel_ranks_compute_the_flops_of_one_between_them(name):
    model = load_model(name)
    alone, divided = (
        flops_of([*attention_work(size), *moe_work(size)]) for size in (sizes(model), sizes(model, tp=4, ep=4))
    )
    assert 4 * divided == pytest.approx(alone)


def test_context_and_expert_tensor_parallelism_divide_the_work():
    alone = flops_of([*attention_work(sizes()), *moe_work(sizes())])
    half = Sizes(MODEL, 4, tokens=np.array([32]), seq_len=32, cp=np.array([2]), ep=np.array([2]))
    assert 2 * flops_of([*attention_work(half), *moe_work(half)]) == pytest.approx(alone)
    narrow = sizes(ep=2, etp=2, tp=4)  # etp ranks gather each other's rows and compute half of every expert
    assert 4 * flops_of(expert_work(narrow)) == pytest.approx(flops_of(expert_work(sizes())))


def test_selective_recomputation_repeats_everything_but_the_last_product_of_a_module():
    device = machine().device
    plain, again = (
        layer_seconds(device, "fp32", sizes(), recompute)
        for recompute in (Recompute(), Recompute(experts=True, attention=True))
    )
    repeated = [*attention_inside(MODEL.attention, sizes())[:-1], expert_work(sizes())[0]]
    activation = Stream("swiglu", sizes().arriving * MODEL.moe.expert_width)
    expected = sum(pair(work)[0] for work in [*repeated, activation])
    assert again.moe_layers.input_grad - plain.moe_layers.input_grad == pytest.approx(expected)
    assert again.moe_layers.weight_grad == plain.moe_layers.weight_grad


def test_full_recompute_repeats_the_forward_of_the_layers_but_not_of_the_head():
    layers = range(2, 4)
    once = sum(layer_forward_flops(MODEL, n, tokens=64, seq_len=32, causal=False).total for n in layers)
    head = head_forward_flops(MODEL, 64)
    none, full = (stage_flops(MODEL, layers, is_last=True, tokens=64, seq_len=32, full=repeat) for repeat in (0, 1))
    assert none == 3 * once + 3 * head
    assert full == 4 * once + 3 * head


def test_capacities_cut_what_the_busiest_rank_has_and_pad_nothing():
    for imbalance, capacity, arriving, leaving in (
        (1.0, 1.25, 64, 64),
        (1.1, 1.25, 71, 64),
        (3.0, 1.25, 80, 64),
        (3.0, 0.5, 32, 32),
    ):
        sizes = Sizes(MODEL, 4, tokens=32, imbalance=imbalance, capacity_factor=capacity)
        assert (sizes.arriving, sizes.leaving) == (arriving, leaving)
