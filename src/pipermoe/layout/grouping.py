"""Experts onto nodes so that a token's choices lie on few of them, with the load even enough.

A deduplicated or hierarchical dispatch sends a token once to each node that it needs: experts that are often chosen
together belong together. Pairs stand for tokens here: the sum over nodes of the co-selections inside.
"""

# L MoE layers, A of them, E logical experts, X pairs of them, G nodes, T tokens, K choices of a token

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.packing import longest_first

Value = Callable[[NDArray, NDArray, NDArray, NDArray], NDArray]


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
    exchanged = partial(_exchanged, pairs_LEE=pairs_LEE, load_LE=load_LE, rounds=rounds)
    careful_LE = exchanged(even_LE, limit_L, _gain_under_the_limit)
    free_LE = exchanged(even_LE, np.full_like(limit_L, np.inf), _gain_under_the_limit)
    under_LE = exchanged(free_LE, limit_L, _relief_of_the_busiest)
    bold_LE = exchanged(under_LE, limit_L, _gain_under_the_limit)
    careful_peak_L, bold_peak_L = (node_loads(each, load_LE, nodes).max(1) for each in (careful_LE, bold_LE))
    better_L = _inside(bold_LE, pairs_LEE) > _inside(careful_LE, pairs_LEE)
    better_L &= bold_peak_L <= np.maximum(limit_L, careful_peak_L)
    return np.where(better_L[:, None], bold_LE, careful_LE)


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


def _exchanged(
    node_LE: NDArray[np.int64],
    limit_L: NDArray,
    value: Value,
    *,
    pairs_LEE: NDArray,
    load_LE: NDArray,
    rounds: int,
) -> NDArray[np.int64]:
    """The nodes after exchanges of two experts, each time the one of the highest value, until none has any.

    `value` of every exchange (L, E, E), -inf for one not to be made, from what it gains, the rows on the busier of its
    two nodes before and after (all (L, E, E)), and the limit of rows (L, 1, 1).
    """
    node_LE = node_LE.copy()
    layer_A = np.arange(len(node_LE))  # those in which something is still worth exchanging
    for _ in range(rounds):
        before, after = _peaks(node_LE[layer_A], load_LE[layer_A])
        gains = _gains(node_LE[layer_A], pairs_LEE[layer_A])
        value_AX = value(gains, before, after, limit_L[layer_A, None, None]).reshape(len(layer_A), -1)
        wanted_A = np.isfinite(value_AX.max(1))
        layer_A, best_A = layer_A[wanted_A], value_AX[wanted_A].argmax(1)
        if not len(layer_A):
            break
        one, other = np.divmod(best_A, node_LE.shape[1])
        node_LE[layer_A, one], node_LE[layer_A, other] = node_LE[layer_A, other], node_LE[layer_A, one]
    return node_LE


def _gain_under_the_limit(gains: NDArray, before: NDArray, after: NDArray, limit: NDArray) -> NDArray:
    """What is gained where both nodes end under the limit, or the busier one lower than it was."""
    return np.where(((after <= limit) | (after < before)) & (gains > 1e-9), gains, -np.inf)


def _relief_of_the_busiest(gains: NDArray, before: NDArray, after: NDArray, limit: NDArray) -> NDArray:
    """While a node is above the limit: the loss for every row that an exchange relieves the busiest of."""
    busiest = before.max((1, 2), keepdims=True)
    relief = np.minimum(before - after, busiest - limit)
    useful = (before == busiest) & (relief > 1e-9)
    return np.where(useful, (gains - 1) / np.where(useful, relief, 1), -np.inf)
