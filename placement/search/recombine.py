"""The best layers of several layouts, put together.

Layouts that annealing finds are about as good as each other, but not layer by layer. What a token
costs at a layer depends on the layout there and, by its owner, on the one a layer before: so the
cheapest chain of layers, each from any of the layouts, is a shortest path. Ranks have no names of
their own: where one layout follows another, its nodes and their ranks are renamed to fit, by linear
assignment.

Shapes: S layouts, L layers, T tokens, E experts, W ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from placement.search.jit import Array, kernel
from placement.search.state import hosts_of, make_layout
from placement.traffic import imbalance_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from placement.search.state import Flow, Layout, Machine, Tokens

BISECTIONS, LOW_PRICE, HIGH_PRICE = 30, 1e-3, 1e3  # rows a token, for one more of imbalance


class Chains(NamedTuple):
    """What layers cost, a token, and what they save after one another.

    Attributes:
        cost: (S, L) cost of a layer if owners run none of the experts.
        uneven: (S, L) max / mean load.
        saved: (L, S, S) what a layer of one layout saves after the layer before of another.
        renamed: (L, S, S, W) the ranks of the layer before that its ranks become.
    """

    cost: NDArray[np.float64]
    uneven: NDArray[np.float64]
    saved: NDArray[np.float64]
    renamed: NDArray[np.int64]


def recombine(
    tokens: Tokens, machine: Machine, layouts: Sequence[Layout], flows: Sequence[Flow], mean: float
) -> Layout:
    """The cheapest chain of layers from any of the layouts.

    Args:
        tokens: what is routed.
        machine: ranks and prices; all ranks in one coherence domain.
        layouts: to choose layers from.
        flows: how the tokens travel under each.
        mean: wanted imbalance, mean over layers; infinity: any.
    """
    chains = weigh(tokens, machine, flows)
    path = cheapest(chains, mean)
    experts, slots = layouts[0].hosts.shape[1], layouts[0].slots.shape[2]
    hosts = np.stack([hosts_of(layout, experts) for layout in layouts])
    chosen = np.empty_like(hosts[0])
    name = np.arange(hosts.shape[3])
    for layer, index in enumerate(path):
        if layer:
            name = name[chains.renamed[layer, path[layer - 1], index]]
        chosen[layer][:, name] = hosts[index, layer]
    return make_layout(chosen, slots_per_rank=slots)


def weigh(tokens: Tokens, machine: Machine, flows: Sequence[Flow]) -> Chains:
    """Prices all layers, and all pairs of layers that may follow each other."""
    count, layers, width = len(flows), *flows[0].load.shape
    weight = float(tokens.weight.sum())
    saved = np.zeros((layers, count, count))
    renamed = np.tile(np.arange(width), (layers, count, count, 1))
    cost = np.stack([flow.cost @ tokens.weight.astype(np.float64) for flow in flows]) / weight
    for layer, after, before in np.ndindex(layers, count, count):
        if layer == 0 and (after != before or len(tokens.foretold_ids)):
            continue
        by_rank = np.zeros((width, width))
        by_node = np.zeros((len(machine.ranks_of_node),) * 2)
        count_kept(tokens, machine, flows[before], flows[after], layer, by_rank, by_node)
        by_rank *= machine.row_cost[0] / weight
        by_node *= machine.row_cost[1] / weight
        if after == before:
            cost[after, layer] += by_rank.trace() + by_node.trace()
        saved[layer, before, after], renamed[layer, before, after] = rename(by_rank, by_node)
    saved[0] = 0.0  # from home tokens start where they do, and save there by chance
    uneven = np.stack([imbalance_of(flow.load) for flow in flows])
    return Chains(np.asarray(cost, dtype=np.float64), uneven, saved, renamed)


@kernel
def count_kept(
    tokens: Tokens,
    machine: Machine,
    before: Flow,
    after: Flow,
    layer: int,
    by_rank: Array,
    by_node: Array,
) -> None:
    """Adds up tokens by owner (of one layout) and visited rank (of another), and by their nodes."""
    count, top_k = after.choice.shape[1], after.choice.shape[2]
    node_of_rank = machine.node_of_rank
    for token in range(count):
        weight = tokens.weight[token]
        owner = before.owner[layer, token]
        for k in range(top_k):
            rank = after.choice[layer, token, k]
            is_new, is_new_node = True, True
            for j in range(k):
                other = after.choice[layer, token, j]
                is_new = is_new and other != rank
                is_new_node = is_new_node and node_of_rank[other] != node_of_rank[rank]
            if is_new:
                by_rank[owner, rank] += weight
            if is_new_node:
                by_node[node_of_rank[owner], node_of_rank[rank]] += weight


def rename(
    by_rank: NDArray[np.float64], by_node: NDArray[np.float64]
) -> tuple[float, NDArray[np.int64]]:
    """The names of the ranks (columns become rows) that keep most, and what they keep.

    >>> rename(np.array([[0.0, 3.0], [1.0, 0.0]]), np.zeros((1, 1)))
    (4.0, array([1, 0]))
    """
    nodes, width = len(by_node), len(by_rank)
    size = width // nodes
    blocks = by_rank.reshape(nodes, size, nodes, size).swapaxes(1, 2)
    inside = np.empty((nodes, nodes, size), dtype=np.int64)
    worth = by_node.copy()
    for old, new in np.ndindex(nodes, nodes):
        rows, columns = linear_sum_assignment(blocks[old, new], maximize=True)
        inside[old, new, columns] = rows
        worth[old, new] += blocks[old, new][rows, columns].sum()
    old_nodes, new_nodes = linear_sum_assignment(worth, maximize=True)
    names = np.empty((nodes, size), dtype=np.int64)
    names[new_nodes] = inside[old_nodes, new_nodes] + old_nodes[:, None] * size
    return float(worth[old_nodes, new_nodes].sum()), names.ravel()


def cheapest(chains: Chains, mean: float) -> list[int]:
    """The layout of every layer: of chains with a mean imbalance within `mean`, the cheapest.

    Found by the price of imbalance; if none is so even, the most even chain.
    """
    if not np.isfinite(mean):
        return shortest(chains, 0.0)
    layers = np.arange(chains.cost.shape[1])
    low, high = LOW_PRICE, HIGH_PRICE
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        if chains.uneven[shortest(chains, price), layers].mean() > mean:
            low = price
        else:
            high = price
    return shortest(chains, high)


def shortest(chains: Chains, price: float) -> list[int]:
    """The layout of every layer on the shortest path, for a price of a layer's imbalance."""
    step = chains.cost + price * chains.uneven
    layers = step.shape[1]
    length, back = step[:, 0], np.zeros((layers, len(step)), dtype=np.int64)
    for layer in range(1, layers):
        all_ways = length[:, None] - chains.saved[layer] + step[:, layer]
        back[layer], length = all_ways.argmin(axis=0), all_ways.min(axis=0)
    path = [int(length.argmin())]
    for layer in range(layers - 1, 0, -1):
        path.append(int(back[layer, path[-1]]))
    return path[::-1]
