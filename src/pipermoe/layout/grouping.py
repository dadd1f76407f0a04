"""Experts onto nodes so that a token's choices lie on few of them, with the load even enough.

A deduplicated or hierarchical dispatch sends a token once to each node that it needs: experts that are often chosen
together belong together. Pairs stand for tokens here: the sum over nodes of the co-selections inside.
"""

# L MoE layers, E logical experts, G nodes, T tokens, K choices of a token

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.packing import longest_first


def co_selections(routes_TLK: NDArray[np.int64], experts: int) -> NDArray[np.float64]:
    """How many tokens chose both experts, (L, E, E), 0 on the diagonal."""
    layers = routes_TLK.shape[1]
    pairs = np.zeros((layers, experts, experts))
    for layer in range(layers):
        chosen_TE = np.zeros((len(routes_TLK), experts), dtype=np.float32)
        np.put_along_axis(chosen_TE, routes_TLK[:, layer], 1, axis=1)
        pairs[layer] = chosen_TE.T @ chosen_TE
        np.fill_diagonal(pairs[layer], 0)
    return pairs


def group_by_co_selection(
    pairs_LEE: NDArray[np.float64], load_LE: NDArray, nodes: int, *, slack: float, rounds: int = 400
) -> NDArray[np.int64]:
    """The node of every expert, (L, E), as many experts on each as can be, no node above 1 + `slack` times its share.

    Exchanges between two nodes, each time the one that brings most co-selections inside, from two starts: experts
    packed by load (never above the limit), and the same once regrouped without any limit and then brought back under it
    by the exchanges that lose least. The better of the two.
    """
    even_LE = group_by_load(load_LE, nodes)
    limit_L = (1 + slack) * load_LE.sum(1) / nodes
    careful_LE = _exchange(even_LE, pairs_LEE, load_LE, limit_L, rounds)
    free_LE = _exchange(even_LE, pairs_LEE, load_LE, np.full(len(load_LE), np.inf), rounds)
    bold_LE = _exchange(
        _brought_under(free_LE, pairs_LEE, load_LE, limit_L, rounds), pairs_LEE, load_LE, limit_L, rounds
    )
    scores = [_inside(node_LE, pairs_LEE) for node_LE in (careful_LE, bold_LE)]
    fits = node_loads(bold_LE, load_LE, nodes).max(1) <= np.maximum(
        limit_L, node_loads(careful_LE, load_LE, nodes).max(1)
    )
    return np.where((fits & (scores[1] > scores[0]))[:, None], bold_LE, careful_LE)


def group_by_load(load_LE: NDArray, nodes: int) -> NDArray[np.int64]:
    """The node of every expert, (L, E): longest first onto nodes with equal room."""
    layers, experts = load_LE.shape
    slots_LGS = longest_first(np.tile(np.arange(experts), (layers, 1)), load_LE, nodes, -(-experts // nodes))
    node_LE = np.zeros((layers, experts + 1), dtype=np.int64)  # empty slots are written behind the experts
    node_of_slot = np.broadcast_to(np.arange(nodes)[None, :, None], slots_LGS.shape)
    np.put_along_axis(node_LE, slots_LGS.reshape(layers, -1) % (experts + 1), node_of_slot.reshape(layers, -1), axis=1)
    return node_LE[:, :experts]


def node_loads(node_LE: NDArray[np.int64], load_LE: NDArray, nodes: int) -> NDArray[np.float64]:
    """Rows of each node, (L, G)."""
    return np.stack([np.where(node_LE == node, load_LE, 0).sum(1) for node in range(nodes)], axis=1)


def _inside(node_LE: NDArray[np.int64], pairs_LEE: NDArray) -> NDArray[np.float64]:
    """Co-selections of experts on one node, (L,)."""
    return (pairs_LEE * (node_LE[:, :, None] == node_LE[:, None])).sum((1, 2))


def _gains(node_LE: NDArray[np.int64], pairs_LEE: NDArray) -> NDArray[np.float64]:
    """Co-selections that come inside when two experts change places, (L, E, E); 0 or less on the same node."""
    nodes = int(node_LE.max()) + 1
    to_LEG = pairs_LEE @ (node_LE[:, :, None] == np.arange(nodes)).astype(float)
    own_LE = np.take_along_axis(to_LEG, node_LE[..., None], axis=2)[..., 0]
    there_LEE = np.take_along_axis(to_LEG, np.broadcast_to(node_LE[:, None], pairs_LEE.shape), axis=2)
    one_LEE = there_LEE - own_LE[..., None]
    gains = one_LEE + one_LEE.transpose(0, 2, 1) - 2 * pairs_LEE
    return np.where(node_LE[:, :, None] == node_LE[:, None], -np.inf, gains)


def _peaks(node_LE: NDArray[np.int64], load_LE: NDArray) -> tuple[NDArray, NDArray]:
    """Rows on the busier of the two nodes now and after experts change places, both (L, E, E)."""
    loads_LG = node_loads(node_LE, load_LE, int(node_LE.max()) + 1)
    mine_LE = np.take_along_axis(loads_LG, node_LE, axis=1)
    moved = load_LE[:, :, None] - load_LE[:, None]
    after = np.maximum(mine_LE[:, :, None] - moved, mine_LE[:, None] + moved)
    return np.maximum(mine_LE[:, :, None], mine_LE[:, None]), after


def _exchange(
    node_LE: NDArray[np.int64], pairs_LEE: NDArray, load_LE: NDArray, limit_L: NDArray, rounds: int
) -> NDArray[np.int64]:
    """The best exchange that leaves both nodes under the limit (or lowers the busier), until none gains."""
    node_LE = node_LE.copy()
    active = np.arange(len(node_LE))
    for _ in range(rounds):
        gains = _gains(node_LE[active], pairs_LEE[active])
        before, after = _peaks(node_LE[active], load_LE[active])
        gains[(after > limit_L[active, None, None]) & (after >= before)] = -np.inf
        active = _swap_best(node_LE, active, gains, gains.max((1, 2)) > 1e-9)
        if not len(active):
            break
    return node_LE


def _brought_under(
    node_LE: NDArray[np.int64], pairs_LEE: NDArray, load_LE: NDArray, limit_L: NDArray, rounds: int
) -> NDArray[np.int64]:
    """While a node is above the limit: the exchange with it that lowers its load at the least loss per row."""
    node_LE = node_LE.copy()
    active = np.arange(len(node_LE))
    for _ in range(rounds):
        before, after = _peaks(node_LE[active], load_LE[active])
        busiest = before.max((1, 2))
        relief = np.minimum(before - after, (busiest - limit_L[active])[:, None, None])
        useful = (before == busiest[:, None, None]) & (relief > 1e-9) & (busiest > limit_L[active])[:, None, None]
        losses = -_gains(node_LE[active], pairs_LEE[active])
        value = np.where(useful & np.isfinite(losses), -(losses + 1) / np.where(useful, relief, 1), -np.inf)
        active = _swap_best(node_LE, active, value, useful.any((1, 2)))
        if not len(active):
            break
    return node_LE


def _swap_best(node_LE: NDArray, active: NDArray, value: NDArray, wanted: NDArray) -> NDArray:
    """Do the exchange of the highest value in the layers that want one, in place; these layers."""
    best = value.reshape(len(active), -1).argmax(1)
    one, other = np.divmod(best[wanted], node_LE.shape[1])
    layer = active[wanted]
    node_LE[layer, one], node_LE[layer, other] = node_LE[layer, other], node_LE[layer, one]
    return layer
