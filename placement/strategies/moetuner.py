"""moetuner: even clusters first, then clusters to ranks, by two integer programs.

Source: MoETuner, arXiv 2502.06643: one program groups the experts of a layer into clusters of equal
number and even token load, the other gives clusters to ranks so that the busiest rank sends as
little as possible to the next layer. The second is solved layer by layer here, given the layer
before. The printed first program lacks the size of a cluster; it is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from placement.affinity import count_transitions
from placement.plan import PlacementPlan, Strategy
from placement.strategies.balanced import pack
from placement.strategies.options import PlacementOptions, slots_per_rank_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace

DEFAULT_TIME_LIMIT = 60.0
GAP = 0.025


def place(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> PlacementPlan:
    """Even clusters, each layer's given to the ranks that hold the experts before them."""
    options = options or PlacementOptions()
    slots_per_rank_for(trace, topology, slots_per_rank)
    ranks = topology.num_ranks
    limit = (options.time_limit or DEFAULT_TIME_LIMIT) / (2 * trace.num_layers)
    transitions = count_transitions(trace).astype(np.float64)
    rank_of = np.zeros((trace.num_layers, trace.num_experts), dtype=np.int64)
    for layer in range(trace.num_layers):
        load = np.bincount(trace.expert_ids[:, layer].ravel(), minlength=trace.num_experts)
        cluster = cluster_experts(load.astype(np.float64), ranks, limit)
        if layer == 0:
            rank_of[layer] = cluster
            continue
        before, after = np.eye(ranks)[rank_of[layer - 1]], np.eye(ranks)[cluster]
        flow = before.T @ transitions[layer - 1] @ after
        rank_of[layer] = assign_clusters(flow, limit)[cluster]
    return PlacementPlan.from_rank_of_expert(
        rank_of,
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="moetuner"),
    )


def cluster_experts(load: NDArray[np.float64], clusters: int, limit: float) -> NDArray[np.int64]:
    """(E,) clusters of equal number whose heaviest is as light as possible."""
    experts = len(load)
    room = -(-experts // clusters)
    num_x = experts * clusters
    item, column = np.repeat(np.arange(experts), clusters), np.arange(num_x)
    part = np.tile(np.arange(clusters), experts)
    each = csr_array((np.ones(num_x), (item, column)), shape=(experts, num_x + 1))
    size = csr_array((np.ones(num_x), (part, column)), shape=(clusters, num_x + 1))
    cells = (np.concatenate([part, np.arange(clusters)]), np.append(column, [num_x] * clusters))
    weight = np.append(load[item], -np.ones(clusters))
    heaviest = csr_array((weight, cells), shape=(clusters, num_x + 1))
    solution = milp(
        np.append(np.zeros(num_x), 1.0),
        integrality=np.append(np.ones(num_x), 0),
        bounds=Bounds(0, np.append(np.ones(num_x), np.inf)),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint(size, 0, room),
            LinearConstraint(heaviest, -np.inf, 0),
        ],
        options={"time_limit": limit, "mip_rel_gap": GAP},
    )
    if solution.x is not None:
        chosen: NDArray[np.int64] = solution.x[:num_x].reshape(experts, clusters).argmax(axis=1)
        return chosen
    cluster = np.zeros(experts, dtype=np.int64)
    for number, held in enumerate(pack(load, np.arange(experts), clusters, room)):
        cluster[held] = number
    return cluster


def assign_clusters(flow: NDArray[np.float64], limit: float) -> NDArray[np.int64]:
    """(C,) rank of each cluster such that the rank that receives most from others gets least.

    Args:
        flow: (W, C) tokens from a rank to a cluster.
        limit: seconds for the solver.
    """
    ranks = len(flow)
    from_others = flow.sum(axis=0) - flow
    row, column = np.divmod(np.arange(ranks * ranks), ranks)
    cells = np.arange(ranks * ranks)
    once = np.ones(ranks * ranks)
    shape = (ranks, ranks * ranks + 1)
    busiest = csr_array(
        (
            np.append(from_others.ravel(), -np.ones(ranks)),
            (np.append(row, np.arange(ranks)), np.append(cells, [ranks * ranks] * ranks)),
        ),
        shape=shape,
    )
    solution = milp(
        np.append(from_others.ravel() * 1e-3, 1.0),
        integrality=np.append(np.ones(ranks * ranks), 0),
        bounds=Bounds(0, np.append(np.ones(ranks * ranks), np.inf)),
        constraints=[
            LinearConstraint(csr_array((once, (row, cells)), shape=shape), 1, 1),
            LinearConstraint(csr_array((once, (column, cells)), shape=shape), 1, 1),
            LinearConstraint(busiest, -np.inf, 0),
        ],
        options={"time_limit": limit, "mip_rel_gap": GAP},
    )
    if solution.x is None:
        return np.arange(ranks)
    rank: NDArray[np.int64] = solution.x[:-1].reshape(ranks, ranks).argmax(axis=0)
    return rank
