"""Laying out the experts of a stage: the placement, and the flat parameters that a mechanism makes of each layer."""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from pipermoe.exchange.executor.gather_json import all_gather_json
from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.policy import Nodes
from pipermoe.layout.spill import SpillRule
from pipermoe.modules.names import layer_of, unit_of
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.bound import BoundExperts
from pipermoe.runtime.layout.carry import Carrier
from pipermoe.runtime.layout.decoupled import DecoupledExperts
from pipermoe.runtime.layout.placement import Placement
from pipermoe.runtime.layout.sparse import SparseExperts
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters
from pipermoe.runtime.optimizer.sharding import Unit
from pipermoe.specs.mesh import coordinates, group_of
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Balance, Mechanism, TrainConfig


class Draw(Protocol):
    def __call__(
        self, parameters: Iterable[tuple[str, Tensor]], experts_of: Callable[[str], Iterable[int]], /
    ) -> None: ...


Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class LaidOut:
    """The layout that a run begins with, over the ranks of an expert-parallel group, and how it may change.

    `mechanism` changes it between steps, None: never. By `spill` experts get copies for one micro-batch.
    """

    layout: ExpertLayout
    mechanism: Mechanism | None
    nodes: Nodes
    spill: SpillRule | None = None

    def placement(self, rank: int) -> Placement:
        """As rank `rank` of the group reads it. Under the sparse mechanism homes are spread evenly, for good."""
        layers, ranks, _ = self.layout.shape
        homes = ExpertLayout.static(layers, ranks, self.layout.num_experts) if self.mechanism == "sparse" else None
        return Placement(self.layout, self.nodes, rank, homes)


def first_layout(plan: Plan, groups: ProcessGroups) -> LaidOut | None:
    """The layout that a run of `plan` begins with. Collective over the world."""
    if not plan.train.balance.lays_out:
        return None
    hosts, ranks = all_gather_json(socket.gethostname(), groups.ep), groups.ep.size()
    on_each = set(Counter(hosts).values())
    return laid_out_in_order(plan.model, plan.train, Nodes(ranks, on_each.pop() if len(on_each) == 1 else ranks))


def laid_out_in_order(model: ModelSpec, train: TrainConfig, nodes: Nodes) -> LaidOut | None:
    """Experts in order over the ranks of `nodes`, and slots to spare; None where a job does not balance."""
    balance, experts = train.balance, model.moe.num_experts
    if not balance.lays_out:
        return None
    slots = experts // nodes.ranks + balance.spare_slots * balance.moves
    layout = ExpertLayout.static(len(model.routers), nodes.ranks, experts, slots)
    return LaidOut(layout, balance.mechanism if balance.moves else None, nodes, spill_rule(balance))


def spill_rule(balance: Balance) -> SpillRule | None:
    """What a run does after the router, if anything."""
    if balance.spill_above is None:
        return None
    return SpillRule(slack=balance.spill_above, most_copies=balance.spill_copies)


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes flat parameters of the experts of each layer; `routers` are the layers of the model that have any."""

    mechanism: Mechanism
    placement: Placement
    routers: tuple[int, ...]
    groups: ProcessGroups
    strategy: Strategy
    carrier: Carrier

    def lay_out(self, named_parameters: Named, draw: Draw) -> tuple[list[FlatParameters], list[Unit]]:
        """What the optimizer updates of expert parameters, and what is brought and taken away for every use.

        `draw` fills weights. Collective over the stage.
        """
        units: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in named_parameters:
            units[unit_of(name)].append((name, parameter))
        made = [self._layer(self.routers.index(layer_of(unit)), named, draw) for unit, named in units.items()]
        return [flat for flat, _ in made], [visitor for _, visitor in made if visitor is not None]

    def _layer(self, layer: int, named: Named, draw: Draw) -> tuple[FlatParameters, Unit | None]:
        placement, groups = self.placement, self.groups
        match self.mechanism:
            case "bound":
                return BoundExperts(named, layer, placement, groups, self.carrier), None
            case "decoupled":
                stage = [coordinates(self.strategy, rank) for rank in group_of(self.strategy, "stage", groups.rank)]
                return DecoupledExperts(named, layer, placement, groups, stage, self.carrier.meter), None
            case "sparse":
                experts = placement.at_home(layer)
                named_homes = _homes(named, experts, draw)
                homes = FlatParameters(named_homes, groups.edp, self.strategy.zero_expert, experts)
                return homes, SparseExperts(named, homes, layer, placement, self.carrier)


def _homes(named_parameters: Named, experts: Sequence[int], draw: Draw) -> list[tuple[str, nn.Parameter]]:
    """Parameters like these with one row for each home."""
    homes = [
        (name, nn.Parameter(parameter.detach().new_empty(len(experts), *parameter.shape[1:])))
        for name, parameter in named_parameters
    ]
    draw(homes, lambda name: experts)
    return homes
