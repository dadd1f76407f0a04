import numpy as np
import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.resources.activations.sizes import INDEX_BYTES
from pipermoe.resources.memory import rank_memory
from pipermoe.resources.parameters import total_parameters
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.states import state_elements
from pipermoe.resources.step import placement_of, predict
from pipermoe.specs.model import LatentAttention, ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


def memory_of(strategy: Strategy, train: TrainConfig = TRAIN, model: ModelSpec = MODEL) -> dict[str, list[int]]:
    table = StrategyTable.of([strategy])
    found = rank_memory(model, train, table, state_elements(model, placement_of(model, table).ranks, table))
    return {name: [rank[name] for rank in found] for name in found[0]}


def test_one_rank_holds_sixteen_bytes_of_state_per_parameter():
    held = memory_of(Strategy())
    parameters = total_parameters(MODEL)
    assert held["weights"] == held["gradients"] == [4 * parameters]
    assert held["optimizer"] == [8 * parameters]


def test_stages_together_hold_what_one_rank_holds():
    for split in ((), (1, 2, 3)):
        assert sum(memory_of(Strategy(pipeline_parallel=3, layer_split=split))["weights"]) == 4 * total_parameters(
            MODEL
        )


def test_zero_one_leaves_each_rank_its_share_of_the_moments():
    layout = Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2)
    [whole] = memory_of(layout)["optimizer"]
    [dense] = memory_of(layout.model_copy(update={"zero_dense": 1}))["optimizer"]
    [both] = memory_of(layout.model_copy(update={"zero_dense": 1, "zero_expert": 1}))["optimizer"]
    experts = 5 * 8 * 3 * 64 * 96 // 2
    assert dense - both == 8 * experts // 2
    assert whole - dense == pytest.approx(8 * (total_parameters(MODEL) - 2 * experts) * 3 / 4, rel=1e-3)
    assert memory_of(layout.model_copy(update={"zero_dense": 1}))["weights"] == memory_of(layout)["weights"]


def test_activations_grow_with_the_micro_batch_and_shrink_with_recompute():
    small, large, full = (
        sum(memory_of(Strategy(micro_batch_size=size).model_copy(update={"recompute": recompute}))["activations"])
        for size, recompute in ((1, "none"), (2, "none"), (2, "full"))
    )
    assert large == 2 * small
    assert full < large


def test_the_first_stage_of_1f1b_holds_one_micro_batch_for_every_stage():
    held = memory_of(Strategy(pipeline_parallel=3, layer_split=(2, 2, 2)), TrainConfig(seq_len=32, global_batch_size=8))
    assert held["activations"][1] > held["activations"][2]
    gpipe = memory_of(Strategy(pipeline_parallel=3, layer_split=(2, 2, 2), schedule="gpipe"))
    assert gpipe["activations"][0] > held["activations"][0]


def test_a_strategy_weighs_the_same_alone_as_among_others():
    rows = [
        Strategy.parse(f"{arrangement} mbs{size} {schedule} {recompute}")
        for arrangement in ("pp2 dp4 ep4", "pp2 dp4 ep2 z1", "pp3 dp2 cp2 tp2 ep4 etp2 z1/0", "dp8 ep8", "dp8 ep8 z3")
        for size in (1, 2)
        for schedule in ("gpipe", "1f1b", "vpp2 interleaved-1f1b", "vpp2 zb-v", "vpp2 dualpipe-v", "zb-h1")
        for recompute in ("", "full", "selective:experts,norm")
        if "vpp2" not in schedule or "pp" in arrangement
    ]
    model = MODEL.model_copy(update={"num_layers": 8, "dense_layers": (0, 1)})
    train = TRAIN.model_copy(update={"global_batch_size": 64})
    table = StrategyTable.of(rows)
    together = peak_bytes(model, train, table)
    for index in range(0, len(rows), 7):
        assert peak_bytes(model, train, table.take(np.array([index])))[0] == together[index]
        held = memory_of(rows[index], train, model)
        assert max(map(sum, zip(*held.values(), strict=True))) == pytest.approx(together[index], abs=8)


def test_the_report_carries_the_peak_of_each_rank_by_category():
    strategy = Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2)
    held = memory_of(strategy)
    for rank in predict(MODEL, machine(), TRAIN, strategy).ranks:
        stage = rank.rank // 2
        assert rank.memory_bytes == {name: values[stage] for name, values in held.items()}
        assert rank.peak_bytes == sum(rank.memory_bytes.values())


@pytest.mark.parametrize("query_rank", [0, 24])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_latent_attention_keeps_what_the_runtime_keeps(query_rank, recompute):
    latent = LatentAttention(
        num_heads=4, q_lora_rank=query_rank, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16
    )
    model = MODEL.model_copy(update={"attention": latent})
    train = TRAIN.model_copy(update={"seq_len": 256})
    strategy = Strategy(micro_batch_size=4, recompute=recompute)
    counted = dry_run(model, train, strategy, rank=0).report
    predicted = sum(sum(category) for category in memory_of(strategy, train, model).values())
    assert predicted == pytest.approx(counted.peak_bytes, rel=0.01)


def test_a_capacity_that_no_expert_reaches_takes_no_memory():
    """But for the way back of its rows, which is another then: no inverse of their order is kept."""
    strategy = Strategy(data_parallel=2, expert_parallel=2, micro_batch_size=4)
    train = TRAIN.model_copy(update={"seq_len": 128, "capacity_factor": 1.25})
    predicted = sum(rank[0] for rank in memory_of(strategy, train).values())
    assert predicted == pytest.approx(dry_run(MODEL, train, strategy, rank=0).report.peak_bytes, rel=0.01)
    dropless = sum(rank[0] for rank in memory_of(strategy, train.model_copy(update={"capacity_factor": 0.0})).values())
    choices = strategy.micro_batch_size * train.seq_len * MODEL.moe.top_k
    assert dropless - predicted == len(MODEL.moe_layers) * choices * INDEX_BYTES
