"""The best placement of a small instance, by branch and bound over its layers.

Every way to fill the slots of a layer is tried, replicas included. Layers are fixed first to last,
with the owners that follow; a branch is cut where its rows, and the least that the layers to come
must cost whatever their owners, reach the best so far.
"""

from __future__ import annotations

from itertools import combinations, product
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from placement.rules import choose_ranks, first_owner, next_owner

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace


def layer_layouts(num_experts: int, num_ranks: int, slots_per_rank: int) -> NDArray[np.int64]:
    """(N, E, W) all ways to put every expert on some ranks.

    >>> layer_layouts(2, 2, 1).tolist()
    [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]
    """
    held = [
        [int(e in some) for e in range(num_experts)]
        for size in range(slots_per_rank + 1)
        for some in combinations(range(num_experts), size)
    ]
    every = [x for x in product(held, repeat=num_ranks) if all(map(any, zip(*x, strict=True)))]
    return np.array(every, dtype=np.int64).transpose(0, 2, 1)


def count_layouts(num_experts: int, topology: Topology, slots_per_rank: int) -> int:
    """How many ways of filling a layer's slots would be looked at."""
    one_rank = sum(comb(num_experts, size) for size in range(slots_per_rank + 1))
    return int(one_rank**topology.num_ranks)


def least_rows(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int,
    coherence_domain: int | None = None,
) -> int:
    """The fewest rows of any layout without load caps; a domain of 1 is `home`."""
    layouts = layer_layouts(trace.num_experts, topology.num_ranks, slots_per_rank)
    ids = np.ascontiguousarray(trace.expert_ids.transpose(1, 0, 2))
    to_come = np.append(np.cumsum(_floors(ids, layouts)[::-1])[::-1], 0)
    domain, node = topology.domain_of_rank(coherence_domain), topology.node_of_rank
    best = int(np.iinfo(np.int64).max)

    home = (trace.sequence_ids % topology.num_ranks).astype(np.int64)
    foretold = None if trace.foretold_ids is None else trace.foretold_ids.astype(np.int64)
    starts = [first_owner(layout, foretold, home, node, domain) for layout in layouts]

    def descend(layer: int, owner: NDArray[np.int64] | None, rows: int) -> None:
        nonlocal best
        if layer == len(ids):
            best = min(best, rows)
            return
        steps = [
            _step(ids[layer], layout, start if owner is None else owner, domain, node)
            for layout, start in zip(layouts, starts, strict=True)
        ]
        for cost, moved in sorted(steps, key=lambda step: step[0]):
            if rows + cost + to_come[layer + 1] >= best:
                break
            descend(layer + 1, moved, rows + cost)

    descend(0, None, 0)
    return best


def _step(
    ids: NDArray[np.int16],
    layout: NDArray[np.int64],
    owner: NDArray[np.int64],
    domain: NDArray[np.int64],
    node: NDArray[np.int64],
) -> tuple[int, NDArray[np.int64]]:
    """Rows of one layer, and the owners after it."""
    ranks = choose_ranks(layout, ids.astype(np.int64), owner, node)
    moved: NDArray[np.int64] = next_owner(ranks, owner, domain)
    runs = (ranks[:, :, None] == np.arange(len(domain))).any(axis=1)
    tokens = np.arange(len(owner))
    rows = 2 * int(runs.sum()) - int(runs[tokens, owner].sum()) - int(runs[tokens, moved].sum())
    return rows, moved


def _floors(ids: NDArray[np.int16], layouts: NDArray[np.int64]) -> list[int]:
    """Rows that each layer costs at least, whatever the owners; 0 where experts have copies."""
    if (layouts.sum(axis=(1, 2)) > layouts.shape[1]).any():
        return [0] * len(ids)
    rank_of = layouts.argmax(axis=2)
    width = np.arange(layouts.shape[2])
    touched = [
        min(int((rank[layer][:, :, None] == width).any(axis=1).sum()) for rank in rank_of)
        for layer in ids
    ]
    return [2 * (ranks - ids.shape[1]) for ranks in touched]
