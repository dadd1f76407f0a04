"""Transfer: what has to travel so that one layout becomes another."""

# L MoE layers, N ranks, E logical experts

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True)
class Move:
    """`destination` gets a copy of `expert` of `layer` from `source`."""

    layer: int
    expert: int
    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """The moves between two layouts, in the order of layers, experts and destinations.

    Read forwards it materialises copies (weights go out), read backwards it reduces them (gradients come home).
    """

    moves: tuple[Move, ...]
    ranks: int

    @classmethod
    def between(cls, before: ExpertLayout, after: ExpertLayout, nodes: Nodes) -> Transfer:
        """Every copy that a rank has in `after` and not in `before` comes from a rank that has one in `before`.

        From a rank of the same node if there is one; of several the one that has sent least so far, so that no rank
        sends everything.
        """
        had_LNE, node = before.copies_LNE > 0, nodes.node_N
        sent = np.zeros(nodes.ranks, dtype=np.int64)
        moves = []
        for layer, expert, destination in np.argwhere(_arrives_LNE(before, after).transpose(0, 2, 1)).tolist():
            holders = np.flatnonzero(had_LNE[layer, :, expert])
            near = holders[node[holders] == node[destination]]
            candidates = near if len(near) else holders
            source = int(candidates[sent[candidates].argmin()])
            sent[source] += 1
            moves.append(Move(layer, expert, source, destination))
        return cls(tuple(moves), nodes.ranks)

    def bytes_NN(self, bytes_per_expert: int) -> NDArray[np.int64]:
        """Bytes from each rank to each rank."""
        matrix = np.zeros((self.ranks, self.ranks), dtype=np.int64)
        for move in self.moves:
            matrix[move.source, move.destination] += bytes_per_expert
        return matrix

    def seconds(self, bytes_per_expert: int, bandwidth_bytes_per_s: float) -> float:
        """Until the busiest rank has sent and received everything, both directions at once."""
        matrix = self.bytes_NN(bytes_per_expert)
        return float(max(matrix.sum(0).max(), matrix.sum(1).max()) / bandwidth_bytes_per_s)


def moved_copies(before: ExpertLayout, after: ExpertLayout) -> NDArray[np.int64]:
    """How many copies travel in each layer, (L,): those that a rank has after and not before."""
    return _arrives_LNE(before, after).sum((1, 2))


def busiest_arrivals(before: ExpertLayout, after: ExpertLayout) -> float:
    """Copies that the rank with the most of all layers receives, per layer."""
    arrives_LNE = _arrives_LNE(before, after)
    return float(arrives_LNE.sum((0, 2)).max() / len(arrives_LNE))


def _arrives_LNE(before: ExpertLayout, after: ExpertLayout) -> NDArray[np.bool_]:
    """Which experts a rank has after and not before."""
    return (after.copies_LNE > 0) & (before.copies_LNE == 0)


def expert_bytes(expert_parameters: int, *, bytes_per_parameter: float = 16.0) -> int:
    """Bytes of one expert that moves with weights, gradients and optimizer state: 16 per parameter, 48*d*d_ffn."""
    return round(expert_parameters * bytes_per_parameter)
