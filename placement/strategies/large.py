"""Machines of many ranks: place experts on nodes by affinity, then on a node's ranks by load."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from placement.plan import PlacementPlan
from placement.search.walk import MAX_RANKS
from placement.strategies.balanced import pack, replicate
from placement.strategies.options import PlacementOptions, StrategyError
from placement.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from placement.trace import RoutingTrace


def place_by_node(
    place: Callable[[RoutingTrace, Topology, int, PlacementOptions], PlacementPlan],
    trace: RoutingTrace,
    topology: Topology,
    num_slots: int,
    options: PlacementOptions,
) -> PlacementPlan:
    """Places on nodes as if they were ranks, then inside each node.

    So a backend that sends a row to each rank is priced as if it sent one to each node.

    Args:
        place: the strategy for nodes: trace, nodes, slots and options to a plan.
        trace: recorded routing.
        topology: more than 64 ranks, at most 64 nodes.
        num_slots: slots of a rank.
        options: the cap is kept on nodes; ranks come as near as their experts' load allows.

    Raises:
        StrategyError: if there are more than 64 nodes.
    """
    if topology.num_nodes > MAX_RANKS:
        msg = f"affinity places on at most {MAX_RANKS} nodes, got {topology.num_nodes}"
        raise StrategyError(msg)
    if options.start is not None or options.spread:
        msg = f"--from and --spread need at most {MAX_RANKS} ranks, got {topology.num_ranks}"
        raise StrategyError(msg)
    nodes = Topology(num_nodes=1, ranks_per_node=topology.num_nodes)
    room = topology.ranks_per_node * num_slots
    node_slots = min(
        room,
        trace.num_experts,
        -(-trace.num_experts // topology.num_nodes) + _spare(trace, topology, num_slots),
    )
    plan = place(trace, nodes, node_slots, replace(options, coherence_domain=None))
    on_node = plan.hosts()
    hosts = np.zeros((trace.num_layers, trace.num_experts, topology.num_ranks), dtype=np.bool_)
    for layer in range(trace.num_layers):
        expert_load = np.bincount(trace.expert_ids[:, layer].ravel(), minlength=trace.num_experts)
        hosts[layer] = _fill_nodes(expert_load, on_node[layer], topology, num_slots)
    full = PlacementPlan.from_hosts(
        hosts,
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=plan.strategy,
    )
    return replace(full, predicted={"imbalance_mean_of_nodes": plan.predicted["imbalance_mean"]})


def _spare(trace: RoutingTrace, topology: Topology, num_slots: int) -> int:
    """Slots of a node beyond its share of the experts, half of which affinity may fill."""
    share = -(-trace.num_experts // topology.num_nodes)
    return max(0, topology.ranks_per_node * num_slots - share) // 2


def _fill_nodes(
    load: NDArray[np.int64], on_node: NDArray[np.bool_], topology: Topology, num_slots: int
) -> NDArray[np.bool_]:
    """(E, W) copies of a layer: each node's experts on its ranks, spare slots by load."""
    width = topology.ranks_per_node
    hosts = np.zeros((len(load), topology.num_ranks), dtype=np.bool_)
    share = load / np.maximum(on_node.sum(axis=1), 1)
    for node in range(topology.num_nodes):
        experts = np.flatnonzero(on_node[:, node])
        copies = replicate(share[experts], width * num_slots, most=width)
        items = np.repeat(experts, copies)
        weight = np.repeat(share[experts] / copies, copies)
        for local_rank, held in enumerate(pack(weight, items, width, num_slots)):
            hosts[held, node * width + local_rank] = True
    return hosts
