"""The builders of exchange plans, by name. Each: (byte matrix, topology, **parameters) -> ExchangePlan."""

from __future__ import annotations

from pipermoe.exchange.builders.direct import direct, group_aware, pairwise
from pipermoe.exchange.builders.logstep import log_step
from pipermoe.exchange.builders.node import hierarchical, mirrored, nic_balanced, one_leader
from pipermoe.exchange.builders.rounds import balanced_rounds

BUILDERS = {
    "direct": direct,
    "pairwise": pairwise,
    "group_aware": group_aware,
    "hierarchical": hierarchical,
    "one_leader": one_leader,
    "nic_balanced": nic_balanced,
    "mirrored": mirrored,
    "balanced_rounds": balanced_rounds,
    "log_step": log_step,
}
