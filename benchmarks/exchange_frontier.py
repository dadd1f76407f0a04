#!/usr/bin/env python3
"""Prediction for OLCF Frontier: RCCL-like direct against group-aware exchange, 16 to 9,408 nodes, by the window model.

    python -m benchmarks.exchange_frontier

RCCL-like: rotation order with a window of 8 steps (our model, from its maintainers' words; not RCCL itself). Ours: the
group-interleaved order, all in flight. The paper (arXiv 2605.05049) reports 1.1 to 9 times on 16 to 512 nodes.
"""

from __future__ import annotations

from pipermoe.exchange.window import Dragonfly, limit_seconds, seconds

BYTES = float(1 << 20)  # per ordered pair of nodes
WINDOW = 8


def ratio(dragonfly: Dragonfly, routing) -> tuple[float, float]:
    """(RCCL-like / ours, ours / physical limit)."""
    bound = limit_seconds(dragonfly, BYTES, routing)
    ours = seconds(dragonfly, BYTES, "group_interleaved", 0, routing)
    return seconds(dragonfly, BYTES, "rotation", WINDOW, routing) / ours, ours / bound


def main() -> None:
    print("RCCL-like (rotation, window 8) over ours (group-interleaved); in brackets ours over the physical limit")
    print(f"{'nodes':>6} {'allocation':>22} {'minimal routing':>18} {'ideal adaptive':>18}")
    for nodes in (16, 32, 64, 128, 256, 512, 1024):
        for groups, label in ((0, "packed"), (min(16, nodes // 4), "spread over groups")):
            dragonfly = Dragonfly.frontier(nodes, over_groups=groups)
            cells = [ratio(dragonfly, routing) for routing in ("minimal", "adaptive")]
            text = "".join(f"{gain:10.2f} ({share:4.2f})" for gain, share in cells)
            print(f"{nodes:6d} {label:>19} {groups or dragonfly.group[-1] + 1:2d} {text}")
    whole = ratio(Dragonfly.frontier(9408), "minimal")
    print(f"  9408 {'packed':>19} 74 {whole[0]:10.2f} ({whole[1]:4.2f})")


if __name__ == "__main__":
    main()
