"""Layout policies: how even, how many copies move, how long planning takes; on made loads and on real routes.

    python -m benchmarks.balance [--traces FOLDER] [--json FILE]

256 experts x 58 layers on 64 ranks of 8 nodes. FOLDER may hold public traces (esft_v2lite_*.npz, smartmoe_*.npz); where
it does not, the traces of the package stand in. CPU times are the best of three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from benchmarks.schedules import best_milliseconds
from pipermoe.layout.exact import Limits, assign_experts
from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.grouping import co_selections, group_by_co_selection, group_by_load, node_loads
from pipermoe.layout.load import drift, imbalance, least_imbalance, rank_load
from pipermoe.layout.policies import POLICIES
from pipermoe.layout.policies.incremental import Incremental
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replay import compare_policies
from pipermoe.layout.spill import SpillRule, load_after, spill
from pipermoe.layout.split import even_split, water_filling
from pipermoe.layout.trace import Trace, read_trace, shipped_traces
from pipermoe.layout.transfer import moved_copies
from pipermoe.layout.workloads import drifted, imbalance_workloads, mixed_shares

LAYERS, EXPERTS, NODES = 58, 256, Nodes(ranks=64, ranks_per_node=8)
ROWS = 1_000_000
T = TypeVar("T")
Row = dict[str, object]


def timed(work: Callable[[], T], repeats: int = 3) -> tuple[T, float]:
    """The result of `work` and its CPU milliseconds, the best of `repeats`."""
    return work(), best_milliseconds(work, repeats)


def planners() -> Iterator[Row]:
    """Every policy from the static layout on a known load, for 4, 5 and 6 slots a rank, beside the lower bound."""
    load_LE = np.rint(mixed_shares(LAYERS, EXPERTS, seed=0) * ROWS).astype(np.int64)
    for slots in (4, 5, 6):
        layout = ExpertLayout.static(LAYERS, NODES.ranks, EXPERTS, slots)
        bound = least_imbalance(load_LE, NODES.ranks, slots)
        yield {"slots": slots * NODES.ranks, "policy": "lower bound", **_evenness(bound), "cpu_ms": 0.0}
        for name, policy in POLICIES.items():
            planned, cpu_ms = timed(lambda policy=policy, before=layout: policy.plan(before, load_LE, NODES))
            found = imbalance(rank_load(planned, load_LE))
            yield {"slots": slots * NODES.ranks, "policy": name, **_evenness(found), "cpu_ms": cpu_ms}


def after_drift() -> Iterator[Row]:
    """320 slots planned for one load; each expert's share takes a log-normal step; what a new plan moves."""
    shares_LE = mixed_shares(LAYERS, EXPERTS, seed=0)
    load_LE = np.rint(shares_LE * ROWS).astype(np.int64)
    layout = POLICIES["balanced"].plan(ExpertLayout.static(LAYERS, NODES.ranks, EXPERTS, 5), load_LE, NODES)
    for step in (0.05, 0.2):
        now_LE = np.rint(drifted(shares_LE, step, seed=1) * ROWS).astype(np.int64)
        for name, policy in (
            ("keep", POLICIES["static"]),
            ("balanced", POLICIES["balanced"]),
            ("eplb", POLICIES["eplb"]),
            ("incremental to 1.05", Incremental(1.05)),
            ("incremental to 1.02", Incremental(1.02)),
        ):
            planned, cpu_ms = timed(lambda policy=policy, now=now_LE: policy.plan(layout, now, NODES))
            yield {
                "drift": f"{step:.0%} of each share (total variation {drift(load_LE, now_LE).mean():.3f})",
                "policy": name,
                **_evenness(imbalance(rank_load(planned, now_LE))),
                "moves_per_layer": float(moved_copies(layout, planned).mean()),
                "cpu_ms": cpu_ms,
            }


def workloads() -> Iterator[Row]:
    """W0 to W7 for 20 steps: max/mean as met, re-planned in every step from the last one."""
    names = ("static", "hill-climbing", "balanced", "incremental", "proportional", "sparse", "heap", "eplb")
    for workload, load_WLE in imbalance_workloads(2, EXPERTS, NODES.ranks, steps=20, rows=ROWS).items():
        chosen = {name: POLICIES[name] for name in names}
        found = compare_policies(
            Trace(workload, load_WLE), chosen, ranks=NODES.ranks, nodes=NODES.count, slots=5, every=1, window=1
        )
        yield {"workload": workload, "bound": found.bound, **{each.policy: each.met for each in found.policies}}


def co_activation(traces: Path) -> Iterator[Row]:
    """Nodes that an unseen token visits, groups made on the first half of the tokens; no copies."""
    nodes = 4
    for trace in _routed(traces):
        assert trace.planning_routes is not None
        assert trace.unseen_routes is not None
        met_LE = _counts(trace.unseen_routes, trace.shape[2])
        for name, group in _groupings(trace.planning_routes, trace.shape[2], nodes).items():
            node_LE, cpu_ms = timed(group, 1)
            yield {
                "trace": trace.name,
                "groups": name,
                "nodes_per_token": _distinct(node_LE, trace.unseen_routes),
                "node_load": float(imbalance(node_loads(node_LE, met_LE, nodes)).mean()),
                "cpu_ms": cpu_ms,
            }


def _groupings(routes_TLK: NDArray[np.int64], experts: int, nodes: int) -> dict[str, Callable[[], NDArray[np.int64]]]:
    load_LE = _counts(routes_TLK, experts)
    return {
        "in order": lambda: np.tile(np.arange(experts) * nodes // experts, (len(load_LE), 1)),
        "by load": lambda: group_by_load(load_LE, nodes),
        "chosen together": lambda: group_by_co_selection(
            co_selections(routes_TLK, experts), load_LE, nodes, slack=0.02
        ),
    }


def token_splits(traces: Path) -> Iterator[Row]:
    """Planned on one step, met ten samples later: even split, water-filling, and copies for one micro-batch."""
    path = traces / "smartmoe_expert_load.npz"
    trace, nodes = (read_trace(str(path)), Nodes(16, 8)) if path.exists() else (read_trace("tiny-none"), Nodes(8, 4))
    _, layers, experts = trace.shape
    static = ExpertLayout.static(layers, nodes.ranks, experts, slots=-(-experts // nodes.ranks) + 2)
    for step in (10, 100, 250):
        load_LE, met_LE = trace.load_WLE[step], trace.load_WLE[step + 1]
        layout = POLICIES["balanced"].plan(static, load_LE, nodes)
        split, cpu_ms = timed(lambda where=layout, load=met_LE: _split(where, load, water_filling))
        spilled = [spill(slots, rows, SpillRule(1.1)) for slots, rows in zip(layout.slots_LNS, split, strict=True)]
        relieved = np.stack([load_after(rows, copies) for rows, copies in zip(split, spilled, strict=True)])
        yield {
            "trace": trace.name,
            "sample": step,
            "planned": float(imbalance(rank_load(layout, load_LE)).mean()),
            "even": float(imbalance(_split(layout, met_LE, even_split).sum(2)).mean()),
            "water_filling": float(imbalance(split.sum(2)).mean()),
            "spill_1.1": float(imbalance(relieved).mean()),
            "copies_per_layer": float(np.mean([len(copies) for copies in spilled])),
            "cpu_ms_per_layer": cpu_ms / layers,
        }


def certificates() -> Iterator[Row]:
    """The quick exchanges beside what HiGHS proves in ten seconds: 32 experts on 8 ranks, no copies; needs scipy."""
    load_LE, nodes = read_trace("tiny-none").load_WLE[-5:].sum(0), Nodes(8, 4)
    layers, experts = load_LE.shape
    swaps = POLICIES["swaps"].plan(ExpertLayout.static(layers, nodes.ranks, experts), load_LE, nodes)
    for layer, peak in enumerate(rank_load(swaps, load_LE).max(1)):
        found, cpu_ms = timed(lambda load=load_LE[layer]: assign_experts(load, 8, 4, limits=Limits(10.0, 1e-4)), 1)
        solved = None if found.rank_E is None else float(np.bincount(found.rank_E, load_LE[layer]).max())
        yield {"layer": layer, "swaps": float(peak), "solved": solved, "bound": found.bound, "cpu_ms": cpu_ms}


def _split(layout: ExpertLayout, load_LE: NDArray[np.int64], split) -> NDArray[np.int64]:
    return np.stack([split(slots, load) for slots, load in zip(layout.slots_LNS, load_LE, strict=True)])


def _evenness(found_L: NDArray[np.float64]) -> Row:
    return {"mean": float(found_L.mean()), "worst": float(found_L.max())}


def _routed(folder: Path) -> list[Trace]:
    """The public traces with routes in the folder, else the shipped ones."""
    paths = sorted(folder.glob("esft_*.npz"))
    return [read_trace(str(path)) for path in paths] or [read_trace(name) for name in shipped_traces()]


def _counts(routes_TLK: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in routes_TLK.transpose(1, 0, 2)])


def _distinct(node_LE: NDArray[np.int64], routes_TLK: NDArray[np.int64]) -> float:
    visited = np.sort(
        np.stack([node[layer] for node, layer in zip(node_LE, routes_TLK.transpose(1, 0, 2), strict=True)])
    )
    return float(1 + (np.diff(visited, axis=2) > 0).sum(2).mean())


def show(title: str, rows: list[Row], console: Console) -> None:
    table = Table(title=title, title_justify="left", box=None)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table, "")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--traces", type=Path, default=Path(), metavar="FOLDER")
    options = parser.parse_args()
    found = {
        f"{EXPERTS} experts x {LAYERS} layers, {NODES.ranks} ranks: max/mean": list(planners()),
        "after a drift of the load": list(after_drift()),
        "W0 to W7: max/mean met, 320 slots": list(workloads()),
        "nodes per token, 4 nodes, unseen tokens": list(co_activation(options.traces)),
        "met max/mean of a plan that is a step old": list(token_splits(options.traces)),
    }
    if find_spec("scipy") is not None:
        found["rows of the busiest rank: exchanges beside an integer program"] = list(certificates())
    console = Console(width=140)
    for title, rows in found.items():
        show(title, rows, console)
    write_json(options, {"date": str(date.today()), **found})


if __name__ == "__main__":
    main()
