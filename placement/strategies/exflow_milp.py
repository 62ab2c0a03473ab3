"""exflow_milp: the integer program of the ExFlow paper on pair weights, nodes first, then ranks.

Source: arXiv 2401.08383, eqs. 8 to 12. The paper has a variable for every token and transition;
tokens that take the same pair of experts cost the same, so one variable a pair of experts is exact.
Balance is the number of experts, not token load; the path of a token is its first choice.
Two layers, two experts each, all tokens 0 -> 1 or 1 -> 0, two ranks: the second layer is crossed.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from placement.affinity import count_transitions
from placement.plan import PlacementPlan, Strategy
from placement.strategies.options import PlacementOptions, StrategyError, slots_per_rank_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace

DEFAULT_TIME_LIMIT = 60.0
MAX_CONSTRAINTS = 2_000_000


def place(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> PlacementPlan:
    """The solver's best plan without replicas; `predicted` has its gap.

    Where the solver finds nothing in time the experts of that stage stay in order.

    Raises:
        StrategyError: if the program is too large to be tried.
    """
    options = options or PlacementOptions()
    num_slots = -(-trace.num_experts // topology.num_ranks)
    slots_per_rank_for(trace, topology, slots_per_rank)
    weights = count_transitions(trace.top1()).astype(np.float64)
    limit = (options.time_limit or DEFAULT_TIME_LIMIT) / (
        1 + topology.num_nodes * (topology.num_nodes > 1)
    )
    everyone = np.tile(np.arange(trace.num_experts), (trace.num_layers, 1))
    rank_of = np.zeros((trace.num_layers, trace.num_experts), dtype=np.int64)
    gaps = []
    node_of, gap = split(
        weights, everyone, topology.num_nodes, num_slots * topology.ranks_per_node, limit
    )
    gaps.append(gap)
    for node in range(topology.num_nodes):
        inside = [np.flatnonzero(layer == node) for layer in node_of]
        local, gap = split(weights, inside, topology.ranks_per_node, num_slots, limit)
        gaps.append(gap)
        for layer, experts in enumerate(inside):
            rank_of[layer, experts] = node * topology.ranks_per_node + local[layer]
    plan = PlacementPlan.from_rank_of_expert(
        rank_of,
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(
            name="exflow_milp", options={"time_limit": options.time_limit or DEFAULT_TIME_LIMIT}
        ),
    )
    return replace(plan, predicted={"mip_gap": [None if g is None else round(g, 4) for g in gaps]})


def split(
    weights: NDArray[np.float64],
    experts: NDArray[np.int64] | list[NDArray[np.int64]],
    parts: int,
    room: int,
    time_limit: float,
) -> tuple[list[NDArray[np.int64]], float | None]:
    """Splits the given experts of every layer into parts with the least weight between parts.

    Args:
        weights: (L - 1, E, E) tokens by expert and next expert.
        experts: the experts of each layer that are to be split.
        parts: number of parts.
        room: experts of a layer that a part can hold.
        time_limit: seconds for the solver.

    Returns:
        The part of each of the given experts by layer, and the solver's relative gap, 0 if there
        was nothing to solve, None if the solver found nothing.
    """
    in_order = [np.arange(len(e)) * parts // max(len(e), 1) for e in experts]
    if parts == 1 or len(experts) == 1:
        return in_order, 0.0
    offsets = np.concatenate([[0], np.cumsum([len(e) for e in experts])])
    pairs, cost = _pairs(weights, experts, offsets)
    if len(pairs) * parts > MAX_CONSTRAINTS:
        msg = (
            f"exflow_milp would need {len(pairs) * parts} constraints, at most {MAX_CONSTRAINTS} "
            f"are tried; use another strategy for so many experts and ranks"
        )
        raise StrategyError(msg)
    num_x, num_y = int(offsets[-1]) * parts, len(cost)
    solution = milp(
        np.concatenate([np.zeros(num_x), cost]),
        integrality=np.concatenate([np.ones(num_x), np.zeros(num_y)]),
        bounds=Bounds(0, 1),
        constraints=[
            _one_part_each(offsets, parts, num_y),
            _room(offsets, parts, room, num_y),
            _crossings(pairs, parts, num_x),
        ],
        options={"time_limit": time_limit},
    )
    if solution.x is None:
        return in_order, None
    part = solution.x[:num_x].reshape(-1, parts).argmax(axis=1)
    return [part[a:b] for a, b in itertools.pairwise(offsets)], float(solution.mip_gap)


def _pairs(
    weights: NDArray[np.float64],
    experts: NDArray[np.int64] | list[NDArray[np.int64]],
    offsets: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(P, 2) pairs of vertices that tokens take one after the other, and how many do."""
    pairs, cost = [], []
    for layer, table in enumerate(weights):
        inner = table[np.ix_(experts[layer], experts[layer + 1])]
        first, second = np.nonzero(inner)
        pairs.append(np.stack([offsets[layer] + first, offsets[layer + 1] + second], axis=1))
        cost.append(inner[first, second])
    return np.concatenate(pairs), np.concatenate(cost)


def _one_part_each(offsets: NDArray[np.int64], parts: int, num_y: int) -> LinearConstraint:
    """Every expert is in one part (eq. 10)."""
    count = int(offsets[-1])
    row, column = np.repeat(np.arange(count), parts), np.arange(count * parts)
    matrix = csr_array((np.ones(len(row)), (row, column)), shape=(count, count * parts + num_y))
    return LinearConstraint(matrix, 1, 1)


def _room(offsets: NDArray[np.int64], parts: int, room: int, num_y: int) -> LinearConstraint:
    """A part holds its share of every layer (eq. 9), or at most `room` where it is uneven."""
    count, layers = int(offsets[-1]), len(offsets) - 1
    layer = np.repeat(np.arange(layers), np.diff(offsets))
    row = (layer[:, None] * parts + np.arange(parts)).ravel()
    shape = (layers * parts, count * parts + num_y)
    matrix = csr_array((np.ones(len(row)), (row, np.arange(count * parts))), shape=shape)
    return LinearConstraint(matrix, 0, room)


def _crossings(pairs: NDArray[np.int64], parts: int, num_x: int) -> LinearConstraint:
    """Y of a pair is 1 where its first expert is in a part and its second is not (eqs. 11, 12)."""
    count = len(pairs)
    row = np.arange(count * parts)
    first = (pairs[:, :1] * parts + np.arange(parts)).ravel()
    second = (pairs[:, 1:] * parts + np.arange(parts)).ravel()
    y = num_x + np.repeat(np.arange(count), parts)
    data = np.concatenate([np.ones(len(row)), -np.ones(len(row)), np.ones(len(row))])
    cells = (np.tile(row, 3), np.concatenate([y, first, second]))
    matrix = csr_array((data, cells), shape=(len(row), num_x + count))
    return LinearConstraint(matrix, 0, np.inf)
