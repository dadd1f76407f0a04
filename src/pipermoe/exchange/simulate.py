"""Flow-level simulation of an exchange plan: max-min fair sharing of links, with the plan's dependencies.

A message flows from the moment all it depends on has completed and the one before it between the same two ranks has
left (a connection keeps its order). Flows share links max-min fairly (progressive filling; Bertsekas and Gallager, Data
Networks, 6.5.2). A message completes its latency after its last byte has left. The same model as SimGrid's CM02 without
its TCP corrections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipermoe.exchange.network import Floats, network_of
from pipermoe.exchange.plan import ExchangePlan, Ints, ranges
from pipermoe.exchange.topology import Topology

SAME_TIME = 1e-9  # relative: flows that end this close together end together


@dataclass(frozen=True, eq=False)
class Simulation:
    """Start and completion of every message in seconds, and how busy the links were."""

    start: Floats  # [M]
    finish: Floats  # [M]
    link_bytes: Floats  # [L]
    link_capacity: Floats  # [L]
    events: int

    @property
    def seconds(self) -> float:
        return float(self.finish.max(initial=0.0))

    @property
    def utilisation(self) -> Floats:
        """Share of the time in which each link is busy at full rate, [L]."""
        return self.link_bytes / self.link_capacity / max(self.seconds, 1e-300)


def simulate(plan: ExchangePlan, topology: Topology, *, resolution: float = 0.0) -> Simulation:
    """Runs the plan in simulated time. Events within `resolution` seconds are one: 0 is exact, more is faster."""
    network = network_of(plan, topology)
    size = plan.message_bytes.astype(np.float64)
    next_of_pair = _next_of_pair(plan)
    blocked = np.diff(plan.first_dependency)
    blocked[next_of_pair[next_of_pair >= 0]] += 1
    dependents, first_dependent = _reverse(plan)
    start, finish = np.zeros(len(plan)), np.zeros(len(plan))
    left = size.copy()
    clock, events = 0.0, 0
    active = np.zeros(0, dtype=np.int64)
    waiting = np.flatnonzero(blocked == 0)  # started when their time in `start` comes
    travelling = np.zeros(0, dtype=np.int64)  # sent, but completing later: in `finish`
    while len(active) or len(waiting) or len(travelling):
        if len(waiting):
            start[waiting] = clock
            active = np.concatenate([active, waiting])
            waiting = waiting[:0]
        rate = _rates(network.path, active, network.capacity)
        ends = left[active] / rate  # 0 where nothing limits the rate
        rate[np.isinf(rate)] = 0.0
        arrival = finish[travelling].min() - clock if len(travelling) else np.inf
        step = min(ends.min(initial=np.inf), arrival)
        if resolution > step:
            step = min(resolution, max(ends.max(initial=0.0), arrival if len(travelling) else 0.0))
        left[active] -= rate * step
        clock, events = clock + step, events + 1

        over = ends <= step * (1 + SAME_TIME)
        sent, active = active[over], active[~over]
        finish[sent] = clock + network.latency[sent]
        travelling = np.concatenate([travelling, sent])
        there = finish[travelling] <= clock * (1 + SAME_TIME)
        done, travelling = travelling[there], travelling[~there]
        released = dependents[ranges(first_dependent[done], first_dependent[done + 1])]
        follower = next_of_pair[sent]
        released = np.concatenate([released, follower[follower >= 0]])
        if len(released):
            np.subtract.at(blocked, released, 1)
            released = np.unique(released)
            waiting = released[blocked[released] == 0]
    return Simulation(start, finish, network.load(plan.message_bytes), network.capacity, events)


def _reverse(plan: ExchangePlan) -> tuple[Ints, Ints]:
    """For every message the messages that depend on it, as one column and row starts."""
    message = np.repeat(np.arange(len(plan)), np.diff(plan.first_dependency))
    order = np.argsort(plan.dependency, kind="stable")
    first = np.searchsorted(plan.dependency[order], np.arange(len(plan) + 1))
    return message[order], first


def _next_of_pair(plan: ExchangePlan) -> Ints:
    """The next message between the same two ranks, -1 after the last."""
    pair = plan.source * plan.num_ranks + plan.destination
    order = np.argsort(pair, kind="stable")
    following = np.full(len(plan), -1, dtype=np.int64)
    same = pair[order][1:] == pair[order][:-1]
    following[order[:-1][same]] = order[1:][same]
    return following


def _rates(path: Ints, active: Ints, capacity: Floats) -> Floats:
    """Rates of the active messages; flows on one path have one rate, so every path is filled once, by its weight."""
    paths, of_path = path[active], np.arange(len(active))
    weight = np.ones(len(active))
    if len(active) > 4096:
        links = len(capacity) + 1
        key = ((paths[:, 0] + 1) * links + paths[:, 1] + 1) * links + paths[:, 2] + 1
        _, first, of_path, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        paths, weight = paths[first], count.astype(np.float64)
    return max_min_rates(paths, capacity, weight)[of_path]


def max_min_rates(path: Ints, capacity: Floats, weight: Floats | None = None) -> Floats:
    """Rate of each of the `weight[f]` flows on every path [F, hops] (-1: no link) under max-min fairness, bytes/s.

    Progressive filling: all rates rise together; those that meet a full link stop. Flows over no limited link get inf.
    """
    links = len(capacity)
    weight = np.ones(len(path)) if weight is None else weight
    rate = np.full(len(path), np.inf)
    hop = np.where(path < 0, links, path)
    free = np.append(capacity.astype(np.float64), np.inf)
    rising = np.arange(len(path))
    flows = np.bincount(hop.ravel(), np.repeat(weight, hop.shape[1]), minlength=links + 1)
    while len(rising):
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(flows > 0.5, free / flows, np.inf)
        share[links] = np.inf
        lowest = share.min()
        if np.isinf(lowest):
            break
        full = share <= lowest * (1 + 1e-12)
        stops = full[hop[rising]].any(axis=1)
        stopped, rising = rising[stops], rising[~stops]
        rate[stopped] = lowest
        taken = np.bincount(hop[stopped].ravel(), np.repeat(weight[stopped], hop.shape[1]), minlength=links + 1)
        flows -= taken
        free -= taken * lowest
    return rate
