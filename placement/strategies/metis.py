"""metis: the graph of all experts cut into as many parts as ranks, then made to fit each layer.

Vertices are the experts of all layers, edges how many tokens use two experts at once or one after
the other. METIS balances the parts over all layers; in each layer the experts then go to ranks by
the assignment that keeps most of their edges, with as many experts a rank as it has slots.
Needs the extra `exflow[metis]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import block_diag, csr_array, lil_array

from placement.affinity import AffinityGraph
from placement.plan import PlacementPlan, Strategy
from placement.strategies.options import PlacementOptions, StrategyError, slots_per_rank_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace


def place(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> PlacementPlan:
    """METIS's k-way cut with exact numbers of experts a layer and rank.

    Raises:
        StrategyError: if pymetis is not installed.
    """
    slots_per_rank_for(trace, topology, slots_per_rank)
    graph = affinity_matrix(trace)
    part = _cut(graph, topology.num_ranks)
    pull = graph @ np.eye(topology.num_ranks)[part]
    room = -(-trace.num_experts // topology.num_ranks)
    by_layer = pull.reshape(trace.num_layers, trace.num_experts, topology.num_ranks)
    return PlacementPlan.from_rank_of_expert(
        np.stack([fit_layer(layer, room) for layer in by_layer]),
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="metis"),
    )


def affinity_matrix(trace: RoutingTrace) -> csr_array:
    """(L * E, L * E) symmetric edge weights."""
    experts, counts = trace.num_experts, AffinityGraph.from_trace(trace)
    graph = lil_array(block_diag([np.triu(layer, 1) for layer in counts.coactivation]))
    for layer, table in enumerate(counts.transitions):
        start = layer * experts
        graph[start : start + experts, start + experts : start + 2 * experts] = table
    upper = csr_array(graph)
    return csr_array(upper + upper.T)


def fit_layer(pull: NDArray[np.float64], room: int) -> NDArray[np.int64]:
    """(E,) ranks that keep most of `pull` (E, W) with at most `room` experts a rank."""
    _, slot = linear_sum_assignment(np.repeat(pull, room, axis=1), maximize=True)
    rank: NDArray[np.int64] = slot // room
    return rank


def _cut(graph: csr_array, parts: int) -> NDArray[np.int64]:
    try:
        import pymetis
    except ModuleNotFoundError as error:
        msg = "the strategy metis needs pymetis; install it with `pip install exflow[metis]`"
        raise StrategyError(msg) from error
    if parts == 1:
        return np.zeros(graph.shape[0], dtype=np.int64)
    adjacency = pymetis.CSRAdjacency(graph.indptr.tolist(), graph.indices.tolist())
    weights = graph.data.astype(np.int64).tolist()
    _, part = pymetis.part_graph(parts, adjacency, eweights=weights)
    return np.asarray(part, dtype=np.int64)
