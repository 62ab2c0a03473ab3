"""The best placement of a small instance, by branch and bound over its layers.

Layouts without replicas whose ranks hold as many experts as linear placement gives each, or any
number up to that of the fullest. Layers are fixed first to last, with the owners that follow; a
branch is cut where its rows and the least that the layers to come must cost reach the best so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.traffic import next_owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace


def layer_layouts(num_experts: int, num_ranks: int) -> NDArray[np.int64]:
    """(N, E) all ways to put experts on ranks of ceil(E / W) slots.

    >>> layer_layouts(2, 2).tolist()
    [[0, 1], [1, 0]]
    """
    room = -(-num_experts // num_ranks)
    return np.array(list(_fill(num_experts, [room] * num_ranks)), dtype=np.int64)


def _fill(experts: int, room: list[int]) -> Iterator[list[int]]:
    if experts == 0:
        yield []
        return
    for rank, left in enumerate(room):
        if left:
            fewer = [r - (i == rank) for i, r in enumerate(room)]
            yield from ([rank, *rest] for rest in _fill(experts - 1, fewer))


def count_layouts(trace: RoutingTrace, topology: Topology) -> float:
    """How many layouts of all layers there are, about."""
    from math import lgamma

    experts, ranks = trace.num_experts, topology.num_ranks
    log_one = lgamma(experts + 1) - ranks * lgamma(experts / ranks + 1)
    return float(np.exp(min(log_one * trace.num_layers, 700.0)))


def least_rows(
    trace: RoutingTrace, topology: Topology, *, coherence_domain: int | None = None
) -> int:
    """The fewest rows of any layout without replicas or load caps; a domain of 1 is `home`."""
    layouts = layer_layouts(trace.num_experts, topology.num_ranks)
    domain = topology.domain_of_rank(coherence_domain)
    ids = np.ascontiguousarray(trace.expert_ids.transpose(1, 0, 2))
    floor = [_least_fan_out(layer, layouts) for layer in ids]
    to_come = np.append(np.cumsum(floor[::-1])[::-1], 0)
    owner = (trace.sequence_ids % topology.num_ranks).astype(np.int64)
    best = np.iinfo(np.int64).max

    def descend(layer: int, owner: NDArray[np.int64], rows: int) -> None:
        nonlocal best
        if layer == len(ids):
            best = min(best, rows)
            return
        steps = [_step(ids[layer], layout, owner, domain) for layout in layouts]
        for cost, moved in sorted(steps, key=lambda step: step[0]):
            if rows + cost + to_come[layer + 1] >= best:
                break
            descend(layer + 1, moved, rows + cost)

    descend(0, owner, 0)
    return int(best)


def _step(
    ids: NDArray[np.int16],
    layout: NDArray[np.int64],
    owner: NDArray[np.int64],
    domain: NDArray[np.int64],
) -> tuple[int, NDArray[np.int64]]:
    """Rows of one layer, and the owners after it."""
    ranks = layout[ids]
    moved: NDArray[np.int64] = next_owner(ranks, owner, domain)
    runs = (ranks[:, :, None] == np.arange(len(domain))).any(axis=1)
    tokens = np.arange(len(owner))
    rows = 2 * int(runs.sum()) - int(runs[tokens, owner].sum()) - int(runs[tokens, moved].sum())
    return rows, moved


def _least_fan_out(ids: NDArray[np.int16], layouts: NDArray[np.int64]) -> int:
    """The fewest rows of a layer whatever the owners: all ranks but one, both ways."""
    width = int(layouts.max()) + 1
    touched = [
        (layout[ids][:, :, None] == np.arange(width)).any(axis=1).sum() for layout in layouts
    ]
    return 2 * (int(min(touched)) - len(ids))
