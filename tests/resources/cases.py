"""A model, a machine and a job of easy numbers, for the tests of resources and planner."""

from pipermoe.specs.device import Device, GroupedCurve, PassRate, RateCurve
from pipermoe.specs.model import GroupedQueryAttention, MixtureOfExperts, ModelSpec
from pipermoe.specs.network import COLLECTIVES, Level, LinkCost
from pipermoe.specs.platform import Host, Platform
from pipermoe.specs.train import TrainConfig

MODEL = ModelSpec(
    name="small",
    vocab_size=256,
    hidden_size=64,
    num_layers=6,
    attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="head"),
    moe=MixtureOfExperts(num_experts=8, top_k=2, expert_width=96, shared_width=32),
    dense_layers=(0,),
    dense_width=128,
)
TRAIN = TrainConfig(seq_len=32, global_batch_size=16)


def flat(rate: float) -> RateCurve:
    return RateCurve(size=(1.0,), rate=(rate,))


def link(latency: float, bandwidth: float) -> dict:
    return {name: LinkCost(latency_seconds=latency, bandwidth_bytes_per_s=bandwidth) for name in COLLECTIVES}


def machine(
    ranks: int = 4,
    compute_slots: float | None = None,
    memory_bytes: int = 2**30,
    meeting_seconds: dict[int, float] | None = None,
) -> Platform:
    """GEMM 10 GFLOP/s below and 40 above 1 MFLOP, links of 1 ms and 1 GB/s inside 2 ranks, 2 ms and 0.5 GB/s above."""
    curve = RateCurve(size=(1e5, 1e6), rate=(10e9, 40e9))
    device = Device(
        name="core",
        memory_bytes=memory_bytes,
        peak_flops_per_s={"fp32": 50e9},
        gemm={"fp32": curve},
        grouped_gemm={"fp32": (GroupedCurve(width=64, size=(1.0, 64.0), rate=(5e9, 20e9)),)},
        attention={"fp32": flat(10e9)},
        attention_backward={"fp32": flat(8e9)},
        memory_bound=flat(5e9),
        passes={"fp32": {"norm": PassRate(forward=flat(1e9), backward=flat(0.5e9))}},
        kernel_seconds=1e-6,
    )
    levels = {2: Level(name="pair", ranks=2, cost=link(1e-3, 1e9))}
    levels |= {ranks: Level(name="all", ranks=ranks, cost=link(2e-3, 0.5e9))}
    return Platform(
        name="machine",
        device=device,
        host=Host(ranks=ranks, compute_slots=compute_slots or ranks, meeting_seconds=meeting_seconds or {}),
        levels=tuple(level for size, level in sorted(levels.items()) if size <= ranks),
    )
