"""A real measurement makes a whole Platform; arguments that cannot be are refused before anything starts."""

import dataclasses

import pytest

from pipermoe.measure import measure_platform
from pipermoe.measure.assemble import Assembly
from pipermoe.measure.collectives import groupings
from pipermoe.measure.record import Record, Settings
from pipermoe.measure.samples import Point
from pipermoe.measure.sizes import MOST_EXPERT_BYTES, QUICK, WIDEST, Effort, Widths, on_gpu
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.device import PASSES
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import MachineError, UserError
from pipermoe.specs.network import COLLECTIVES, Collective
from pipermoe.specs.platform import Platform

MIB = 2**20


@pytest.mark.parametrize("nproc", [0, -1, 10_000])
def test_a_number_of_ranks_that_cannot_be_is_refused(nproc):
    with pytest.raises(UserError, match=rf"nproc = {nproc}: must be from 1 to \d+ ranks"):
        measure_platform(nproc=nproc)


def test_a_memory_budget_that_holds_nothing_is_refused():
    with pytest.raises(UserError, match=r"memory = 12: must be at least 1\.00 MiB"):
        measure_platform(nproc=2, memory_bytes=12)


def test_widths_are_those_of_the_model():
    widths, model = Widths.of(load_model("tiny-moe")), load_model("tiny-moe")
    assert widths.hidden == model.hidden_size
    assert widths.query == model.attention.num_heads * model.attention.query_key_dim
    assert (widths.num_experts, widths.top_k) == (model.moe.num_experts, model.moe.top_k)
    assert widths.expert_width == model.moe.expert_width


def test_a_huge_model_is_measured_in_pieces_that_a_rank_can_hold():
    tiny = load_model("tiny-moe")
    attention = tiny.attention.model_copy(update={"num_heads": 128, "num_kv_heads": 16, "head_dim": 128})
    moe = tiny.moe.model_copy(update={"num_experts": 256, "expert_width": 2**16})
    widths = Widths.of(tiny.model_copy(update={"hidden_size": 8192, "attention": attention, "moe": moe}))
    assert max(widths.query, widths.key_value, widths.expert_width) <= WIDEST
    assert widths.num_heads * widths.head_dim <= WIDEST
    assert widths.num_heads == 8 * widths.num_kv_heads
    assert widths.experts == 1 or widths.experts * 12 * widths.hidden * widths.expert_width <= MOST_EXPERT_BYTES


def test_an_accelerator_is_measured_at_larger_sizes():
    assert on_gpu(QUICK).tokens[-1] == 16 * QUICK.tokens[-1]
    assert on_gpu(QUICK).message_bytes[:-1] == QUICK.message_bytes


FASTEST = dataclasses.replace(
    QUICK, tokens=(64, 256), rows_per_expert=(8, 64), seq_lens=(64,), pass_tokens=(64,), element_counts=(2**10, 2**16),
    parameter_counts=(2**14,), message_bytes=(2**12, 2**16, 2**18), compute_seconds=2e-3, message_seconds=5e-3,
    crowd_seconds=0.05,
)  # fmt: skip


@pytest.fixture
def fastest(monkeypatch):
    def use(effort: Effort) -> None:
        monkeypatch.setattr("pipermoe.measure.sizes.QUICK", effort)

    use(FASTEST)


@pytest.mark.distributed
def test_two_ranks_on_one_core_measure_everything_that_a_platform_holds(fastest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipermoe.measure.measure.usable_cores", lambda: 1)
    model = load_model("tiny-moe")
    platform = measure_platform(nproc=2, model=model, memory_bytes=96 * MIB, quick=True)
    assert platform is not None
    device, host, (level,) = platform.device, platform.host, platform.levels
    assert device.memory_bytes == 96 * MIB
    assert device.peak_flops_per_s["fp32"] >= max(device.grouped_gemm["fp32"][0].rate)
    assert device.grouped_gemm["fp32"][0].size == (8.0, 64.0)
    assert device.attention["fp32"].size == device.attention_backward["fp32"].size == (64.0,)
    assert device.memory_bound.size == (12.0 * 2**10, 12.0 * 2**16)
    passes = device.passes["fp32"]
    assert set(passes) == set(PASSES)
    assert {kind for kind in PASSES if passes[kind].backward is None} == {"optimizer", "gradient_norm"}
    assert passes["norm"].forward.size == (64.0 * model.hidden_size,)
    assert host.ranks == 2
    assert 0 < host.compute_slots <= 2
    assert set(host.meeting_seconds) == {2}
    assert level.ranks == 2
    assert set(level.cost) == set(COLLECTIVES)
    for key in (
        "device.gemm",
        "device.grouped_gemm",
        "device.passes.fp32.norm",
        "host.meeting_seconds.2",
        "levels.host.cost.all_to_all",
    ):
        evidence = platform.evidence_for(key)
        assert evidence is not None
        assert evidence.kind in ("measured", "fitted")
        assert evidence.date
        assert "torch" in evidence.software
    assert load(save(tmp_path / "machine.toml", platform), Platform) == platform
    assert load(save(tmp_path / "machine.json", platform), Platform) == platform
    assert capsys.readouterr().err.splitlines()[0] == "measuring matrix products"


@pytest.mark.distributed
def test_one_rank_alone_has_a_network_to_itself_that_is_marked_as_assumed(fastest):
    platform = measure_platform(nproc=1, quick=True)
    assert platform is not None
    assert platform.levels[0].ranks == 1
    evidence = platform.evidence_for("levels.host.cost.send")
    assert evidence is not None
    assert evidence.kind == "assumed"


SETTINGS = Settings(
    ranks=4, ranks_per_host=4, device="cpu", device_bytes=0, reserved_bytes=0, precision="fp32", widths=Widths(),
    effort=QUICK, software={"torch": "2.13"},
)  # fmt: skip


def assemble(ranks: list[dict[str, list[Point]]], settings: Settings = SETTINGS) -> Platform:
    points = tuple({key: tuple(found) for key, found in rank.items()} for rank in ranks)
    return Assembly(Record(settings=settings, sections={"all": points}), 2**30, "given", 0, "2026-01-01").platform()


def synthetic_rank(ranks_per_host: int = 4) -> dict[str, list[Point]]:
    """What a rank of a machine with 4 ranks on 2 cores measures: 100 GFLOP/s, 1 GB/s, 10 ms of yardstick, no noise."""
    points = {"gemm": [Point(1e6, 3e6, 3e-5)], "grouped_gemm": [Point(r, 1e6 * r, 1e-5 * r) for r in (1.0, 1024.0)]}
    points["grouped_skew"] = [Point(r, 1e6 * r, 2e-5 * 400) for r in (100.0, 300.0)]
    points |= {key: [Point(128, 1e9, 1e-2)] for key in ("attention.forward", "attention.backward", "memory_bound")}
    points |= {f"passes.{kind}.forward": [Point(1e3, 1e3, 1e-6)] for kind in PASSES}
    points |= {"kernel_seconds": [Point(1, 128, 128e-6)], "noise": [Point(1, 1, 1e-2)] * 10}
    points |= {"layer.forward": [Point(1, 1, 2e-3)], "layer.backward": [Point(1, 1, 3e-3)]}
    points |= {"alone": [Point(2, 1, 1e-2)], "crowd": [Point(4, 50, 1.0)]}
    points |= {"meeting.2": [Point(2, 1, 1.1e-3)], "meeting.4": [Point(4, 1, 5e-5)]}
    messages = [Point(n, n, 1e-4 + n / 1e9) for n in (1e3, 1e5, 1e7)]
    collectives: list[Collective] = [name for name in COLLECTIVES if name != "send"]
    for group in groupings(4, ranks_per_host):
        points |= {f"{group.level}.{name}.{group.size}": messages for name in collectives}
        points[f"{group.level}.all_to_all_skew"] = [Point(1e6, 1e6, 2 * (1e-4 + 1e6 / 1e9))]
        points[f"{group.level}.send"] = messages
    return points


def test_known_points_assemble_to_the_machine_that_they_came_from():
    platform = assemble([synthetic_rank()] * 4)
    assert platform.host.compute_slots == 2.0  # 4 ranks x 50 calls/s x 10 ms
    assert platform.host.meeting_seconds == {2: pytest.approx(1e-3), 4: 0.0}  # less a latency of 0.1 ms, none left
    assert platform.host.noise == 0.0
    assert platform.device.gemm["fp32"].rate == (1e11,)
    assert platform.device.kernel_seconds == pytest.approx(1e-6)
    assert (platform.device.layer_forward_seconds, platform.device.layer_backward_seconds) == (2e-3, 3e-3)
    (level,) = platform.levels
    for cost in (*level.cost.values(), *level.group_cost[2].values()):
        assert cost.latency_seconds == pytest.approx(1e-4)
        assert cost.bandwidth_bytes_per_s == pytest.approx(1e9)


def test_ranks_compute_on_no_more_than_the_cores_of_their_host():
    disturbed = synthetic_rank() | {"alone": [Point(2, 1, 1.5e-2)]}  # 4 ranks x 50 calls/s x 15 ms are 3
    assert assemble([disturbed] * 4).host.compute_slots == 2.0


def test_evidence_tells_how_well_even_curves_price_uneven_work():
    platform = assemble([synthetic_rank()] * 4)
    grouped, uneven = (platform.evidence_for(key) for key in ("device.grouped_gemm", "levels.host.cost.all_to_all"))
    assert grouped is not None
    assert "uneven rows took 2.00 of" in grouped.source
    assert uneven is not None
    assert "an uneven call took 2.00 of" in uneven.source


def test_a_collective_without_enough_sizes_is_a_machine_error():
    broken = synthetic_rank() | {"host.all_gather.4": [Point(1e3, 1e3, 1e-4)]}
    with pytest.raises(MachineError, match="measuring all_gather: 1 of at least 2 message sizes"):
        assemble([broken] * 4)


def test_several_hosts_make_a_level_inside_and_one_between_them():
    settings = SETTINGS.model_copy(update={"ranks_per_host": 2})
    platform = assemble([synthetic_rank(ranks_per_host=2)] * 4, settings)
    assert [(level.name, level.ranks, sorted(level.group_cost)) for level in platform.levels] == [
        ("node", 2, []),
        ("system", 4, [2]),
    ]
    assert platform.host.ranks == 2
    assert platform.host.compute_slots == 1.0  # 4 ranks x 50 calls/s x 10 ms, on two hosts


def test_groups_are_powers_of_two_on_a_host_and_one_rank_of_each_between_hosts():
    found = [(group.level, group.size, group.members(5)) for group in groupings(16, 4)]
    assert found == [
        ("node", 2, [4, 5]),
        ("node", 4, [4, 5, 6, 7]),
        ("system", 4, [1, 5, 9, 13]),
        ("system", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("system", 16, list(range(16))),
    ]
    assert [group.size for group in groupings(6, 6)] == [2, 6]
    assert groupings(1, 1) == []
