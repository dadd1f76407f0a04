"""The flow simulation and the window model against times that can be worked out by hand, and against SimGrid."""

import json
import shutil
import subprocess
import time

import numpy as np
import pytest

from pipermoe.exchange import window
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.cost import limit_seconds
from pipermoe.exchange.simulate import max_min_rates, simulate
from pipermoe.exchange.topology import Topology, frontier

MIB = 1 << 20


def even(size, value=1000):
    return np.full((size, size), value, dtype=np.int64)


def test_rates_are_max_min_fair():
    # flows 0 and 1 share link 0 (10); flow 1 also crosses link 1 (3); flow 2 has link 1 with it; flow 3 is unlimited
    path = np.array([[0, -1], [0, 1], [1, -1], [-1, -1]])
    assert max_min_rates(path, np.array([10.0, 3.0])).tolist() == [8.5, 1.5, 1.5, float("inf")]


def test_flows_that_share_a_path_count_with_their_weight():
    path = np.array([[0], [0]])
    rates = max_min_rates(path, np.array([12.0]), np.array([2.0, 1.0]))
    assert rates.tolist() == [4.0, 4.0]


def test_a_direct_exchange_takes_the_bound():
    topology = Topology.even(8, groups=2, nic_bandwidth=1e6, global_bandwidth=2e6)
    result = simulate(BUILDERS["direct"](even(8), topology), topology)
    assert result.seconds == pytest.approx(limit_seconds(even(8), topology), rel=1e-9)
    assert result.seconds == pytest.approx(4 * 4 * 1000 / 2e6)
    assert result.utilisation.max() == pytest.approx(1.0)


def test_stages_that_depend_on_each_other_add_up_and_chunks_overlap():
    topology = Topology.even(2, 2, nic_bandwidth=1e3, local_bandwidth=1e3)
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[1, 3] = 1000  # carried by rank 1 % 2 = 1 of node 0, and by rank 0 of node 1: cross, then scatter
    whole = simulate(BUILDERS["hierarchical"](counts, topology), topology)
    assert whole.seconds == pytest.approx(2.0)
    chunked = simulate(BUILDERS["hierarchical"](counts, topology, chunk_bytes=100), topology)
    assert 1.0 < chunked.seconds < whole.seconds


def test_latency_is_paid_once_per_hop():
    topology = Topology.even(2, 2, nic_bandwidth=1e3, local_bandwidth=1e3, local_latency=0.25, nic_latency=0.5)
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[1, 3] = 1000
    assert simulate(BUILDERS["hierarchical"](counts, topology), topology).seconds == pytest.approx(2.75)


def test_rotation_idles_global_links_that_the_group_aware_order_keeps_busy():
    topology = Topology.even(64, groups=8, nic_bandwidth=25e9, global_bandwidth=25e9 * 8 * 0.57 / 7)
    bound = limit_seconds(even(64, MIB), topology)
    times = {
        (name, size): simulate(BUILDERS[name](even(64, MIB), topology, window=size), topology).seconds / bound
        for name in ("pairwise", "group_aware")
        for size in (1, 4)
    }
    assert times["pairwise", 1] == pytest.approx(5.5, rel=0.01)
    assert times["group_aware", 4] < 1.3


def test_a_thousand_ranks_are_simulated_in_seconds():
    topology = frontier(128)
    plan = BUILDERS["direct"](even(1024, 65536), topology)
    begin = time.process_time()
    result = simulate(plan, topology)
    assert time.process_time() - begin < 10
    # the links inside the node work beside the NICs, so only latency separates a direct exchange from the bound
    assert result.seconds == pytest.approx(limit_seconds(plan.counts, topology) + 2e-6, rel=1e-6)


def test_the_window_model_agrees_with_the_flow_simulation_where_the_bottleneck_stays_busy():
    group = np.repeat(np.arange(8), 8)
    dragonfly = window.Dragonfly(tuple(group.tolist()), 25e9, 25e9 * 8 * 0.57 / 7)
    topology = Topology.even(64, groups=8, nic_bandwidth=25e9, global_bandwidth=25e9 * 8 * 0.57 / 7)
    bound = limit_seconds(even(64, MIB), topology)
    assert window.limit_seconds(dragonfly, MIB) == pytest.approx(bound)
    simulated = simulate(BUILDERS["pairwise"](even(64, MIB), topology, window=1), topology).seconds
    assert window.seconds(dragonfly, MIB, "rotation", 1) == pytest.approx(simulated, rel=0.01)
    assert window.seconds(dragonfly, MIB, "group_interleaved", 0) == pytest.approx(bound)


def test_every_window_model_order_moves_all_pairs_once():
    group = np.array([0, 0, 0, 1, 1, 1, 2, 2])  # the last group is smaller
    for order in ("rotation", "group_interleaved"):
        met = np.zeros((8, 8), dtype=int)
        for destination in window.steps(order, group):
            sends = destination >= 0
            met[np.flatnonzero(sends), destination[sends]] += 1
        np.fill_diagonal(met, 1)
        assert (met == 1).all(), order


def test_adaptive_routing_helps_rotation_and_never_beats_its_bound():
    dragonfly = window.Dragonfly.frontier(512)
    minimal = window.seconds(dragonfly, MIB, "rotation", 8)
    adaptive = window.seconds(dragonfly, MIB, "rotation", 8, "adaptive")
    assert window.limit_seconds(dragonfly, MIB, "adaptive") < adaptive < minimal


def test_detours_share_the_excess_of_a_link_over_two_hops():
    traffic = np.zeros((3, 3))
    traffic[0, 1] = 3.0  # 1.5 straight, 1.5 over group 2
    assert window.detoured(traffic) == pytest.approx(1.5, rel=1e-6)


@pytest.mark.slow
def test_all_of_frontier_is_predicted_in_seconds():
    begin = time.process_time()
    whole = window.Dragonfly.frontier(9408)
    rotation = window.seconds(whole, MIB, "rotation", 8)
    assert time.process_time() - begin < 20
    assert rotation / window.limit_seconds(whole, MIB) > 50


SIMGRID = """
import json, sys
from simgrid import Actor, Comm, Engine, LinkInRoute, NetZone
groups, size, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ranks, nic, m = groups * size, 25e9, 1 << 20
Engine_ = Engine(["x", "--cfg=network/model:CM02", "--cfg=network/crosstraffic:0", "--cfg=network/TCP-gamma:0",
                  "--log=root.thres:critical"])
zone = NetZone.create_full_zone("z")
hosts = [zone.create_host(f"h{i}", "1Gf").seal() for i in range(ranks)]
link = lambda name, rate: zone.create_link(name, rate).set_latency(1e-9).seal()
up, down = [link(f"u{i}", nic) for i in range(ranks)], [link(f"d{i}", nic) for i in range(ranks)]
far = {(a, b): link(f"g{a}_{b}", nic * size * 0.57 / (groups - 1))
       for a in range(groups) for b in range(groups) if a != b}
for s in range(ranks):
    for d in range(ranks):
        if s != d:
            middle = [far[s // size, d // size]] if s // size != d // size else []
            route = [LinkInRoute(x) for x in (up[s], *middle, down[d])]
            zone.add_route(hosts[s].netpoint, hosts[d].netpoint, None, None, route, False)
zone.seal()
def run():
    rounds = [range(1, ranks)] if mode == "direct" else [[k] for k in range(1, ranks)]
    for steps in rounds:
        Comm.wait_all([Comm.sendto_async(hosts[i], hosts[(i + k) % ranks], m) for k in steps for i in range(ranks)])
    print(json.dumps(Engine.clock))
Actor.create("run", hosts[0], run)
Engine_.run()
"""


# Seconds of 1 MiB per pair by SimGrid 3.32 (Debian 12's python3-simgrid) with the program above: groups, hosts, order.
SIMGRID_SECONDS = {
    (4, 4, "direct"): 0.0008830143684210528,
    (3, 2, "direct"): 0.0002943401228070176,
    (8, 2, "direct"): 0.0010301829298245617,
    (4, 4, "pairwise"): 0.002207571421052632,
}


@pytest.mark.parametrize(("groups", "size", "order"), SIMGRID_SECONDS)
def test_the_simulation_equals_simgrid_on_a_dragonfly(groups, size, order):
    far = 25e9 * size * 0.57 / (groups - 1)
    topology = Topology.even(groups * size, groups=groups, nic_bandwidth=25e9, global_bandwidth=far)
    ours = simulate(BUILDERS[order](even(groups * size, MIB), topology), topology).seconds
    assert ours == pytest.approx(SIMGRID_SECONDS[groups, size, order], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "size", "order"), SIMGRID_SECONDS)
def test_simgrid_still_says_what_it_said(groups, size, order):
    python = shutil.which("python3", path="/usr/bin")
    if not python or subprocess.run([python, "-c", "import simgrid"], capture_output=True, check=False).returncode:
        pytest.skip("needs SimGrid's Python package (Debian: apt-get install python3-simgrid)")
    command = [python, "-c", SIMGRID, str(groups), str(size), order]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == pytest.approx(SIMGRID_SECONDS[groups, size, order], rel=1e-4)
