"""What is counted in a real step equals the formulas of the resource model, to the unit."""

from __future__ import annotations

import pytest
import torch
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for, reduced_gradients

from pipermoe.resources.flops import head_forward_flops, layer_forward_flops
from pipermoe.runtime.counters import FlopCounter, MemoryCounter, TrafficCounter
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.report import MemoryCategory, Traffic
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed

CASES = {
    "pp4": ("plain", Strategy(pipeline_parallel=4)),
    "pp2 ep2": ("rich", Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2)),
    "ep4, recompute": ("sigmoid", Strategy(data_parallel=4, expert_parallel=4, recompute="full", micro_batch_size=2)),
    "pp2 ep2, latent attention": ("latent", Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2)),
    "pp4, sinks and windows, recompute": ("sinks", Strategy(pipeline_parallel=4, recompute="full")),
    "ep2 edp2": ("rich", Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2)),
}


def balanced_counts(strategy: Strategy, model_name: str) -> list[list[int]]:
    moe = MODELS[model_name].moe
    rows = strategy.micro_batch_size * TRAIN.seq_len * moe.top_k
    assert rows % moe.num_experts == 0
    return [[rows // moe.num_experts] * moe.num_experts for _ in range(strategy.expert_parallel)]


def count(rank: int, model_name: str, strategy: Strategy, planned: bool) -> dict:
    groups = ProcessGroups.create(strategy)
    counts = balanced_counts(strategy, model_name) if planned else None
    engine = engine_for(MODELS[model_name], strategy, groups, planned_counts=counts)
    batch = batch_for(strategy, groups.coordinates.dp, 0)
    engine.step(batch)
    reduced_gradients(engine)
    parameters = [parameter for _, parameter in engine.named_parameters()]
    known: dict[MemoryCategory, list] = {"weights": parameters, "gradients": [each.grad for each in parameters]}
    memory, flops, traffic = MemoryCounter(engine.meter, known), FlopCounter(), TrafficCounter()
    with memory, flops, traffic:
        engine.step(batch)
        reduced_gradients(engine)
    return {
        "stage": groups.coordinates.pp,
        "flops": flops.flops,
        "traffic": traffic.traffic,
        "peak": memory.peak_bytes,
        "memory": memory.bytes_at_peak,
        "weights": sum(parameter.numel() * 4 for parameter in parameters),
    }


@pytest.mark.parametrize(("model_name", "strategy"), CASES.values(), ids=list(CASES))
def test_flops_and_traffic_of_a_balanced_step_equal_the_formulas(model_name: str, strategy: Strategy):
    model, steps = MODELS[model_name], strategy.microbatches(TRAIN.global_batch_size)
    tokens, ep, pp = strategy.micro_batch_size * TRAIN.seq_len, strategy.expert_parallel, strategy.pipeline_parallel
    stages = split_layers(model.num_layers, pp)
    passes = 4 if strategy.recompute == "full" else 3
    for rank in run_ranks(count, strategy.world_size, model_name, strategy, True):
        layers = stages[rank["stage"]]
        flops = passes * sum(
            layer_forward_flops(model, layer, tokens=tokens, seq_len=TRAIN.seq_len, causal=False).total
            for layer in layers
        )
        if rank["stage"] == pp - 1:
            flops += 3 * head_forward_flops(model, tokens)
        assert rank["flops"] == steps * flops

        exchanges = 4 * steps * sum(map(model.is_moe, layers))
        leaving = tokens * model.moe.top_k * (ep - 1) // ep * model.hidden_size * 4
        sends = steps * ((rank["stage"] > 0) + (rank["stage"] < pp - 1))
        expected = {}
        if ep > 1:
            expected["all_to_all.ep"] = Traffic(calls=exchanges, bytes=exchanges * leaving)
        if pp > 1:
            expected["send.pp"] = Traffic(calls=sends, bytes=sends * tokens * model.hidden_size * 4)
        assert {key: each for key, each in rank["traffic"].items() if not key.startswith("all_reduce")} == expected


def test_the_exchange_of_counts_is_one_small_message_per_layer_and_microbatch():
    model_name, strategy = CASES["pp2 ep2"]
    model = MODELS[model_name]
    for rank in run_ranks(count, strategy.world_size, model_name, strategy, False):
        layers = split_layers(model.num_layers, 2)[rank["stage"]]
        calls = strategy.microbatches(TRAIN.global_batch_size) * sum(map(model.is_moe, layers))
        expected = Traffic(calls=calls, bytes=calls * 8 * model.moe.num_experts // 2)
        assert rank["traffic"]["all_to_all_counts.ep"] == expected
        assert rank["traffic"]["all_to_all.ep"].calls == 4 * calls


def test_memory_categories_add_up_to_the_peak_and_repeat_exactly():
    model_name, strategy = CASES["pp2 ep2"]
    first, again = (run_ranks(count, strategy.world_size, model_name, strategy, True) for _ in range(2))
    for rank, same in zip(first, again, strict=True):
        assert sum(rank["memory"].values()) == rank["peak"]
        assert rank["memory"]["weights"] == rank["memory"]["gradients"] == rank["weights"]
        assert rank["memory"]["activations"] > 0
        assert rank["memory"] == same["memory"]


def test_recompute_and_1f1b_save_activations():
    def total(**options) -> int:
        strategy = Strategy(pipeline_parallel=2, **options)
        return sum(rank["memory"]["activations"] for rank in run_ranks(count, 2, "plain", strategy, True))

    gpipe = total(schedule="gpipe")
    assert total(schedule="1f1b") < gpipe
    assert total(schedule="gpipe", recompute="full") < 0.6 * gpipe


def test_tensors_that_the_counter_was_not_told_of_do_not_count():
    old = torch.zeros(1000)
    meter = Meter()
    counter = MemoryCounter(meter, {"weights": [torch.zeros(10)]})
    with counter:
        view = old[:500].add_(1)
        with meter.born("activations"):
            new = view * 2
        del new
        torch.zeros(100)
    assert counter.peak_bytes == 500 * 4
    assert counter.bytes_at_peak["activations"] == 2000
