"""balanced: replicas and packing by token load alone, as DeepSeek's EPLB does.

Source: the algorithm that deepseek-ai/EPLB's README describes, written anew. Hierarchical on several
nodes: experts are packed into nodes, replicated inside a node, packed onto its ranks. Global on one.
Loads 90, 10, 10, 10 on two ranks of three slots: expert 0 gets both copies to spare, one a rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.plan import PlacementPlan, Strategy
from placement.strategies.options import PlacementOptions, slots_per_rank_for

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
    """The plan with the most even token load that greedy replication and packing find."""
    num_slots = slots_per_rank_for(trace, topology, slots_per_rank)
    hosts = np.zeros((trace.num_layers, trace.num_experts, topology.num_ranks), dtype=np.bool_)
    for layer in range(trace.num_layers):
        load = np.bincount(trace.expert_ids[:, layer].ravel(), minlength=trace.num_experts)
        hosts[layer] = balance_layer(load.astype(np.float64), topology, num_slots)
    return PlacementPlan.from_hosts(
        hosts,
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="balanced", options={"slots_per_rank": num_slots}),
    )


def balance_layer(
    load: NDArray[np.float64], topology: Topology, slots_per_rank: int
) -> NDArray[np.bool_]:
    """(E, W) copies of one layer's experts."""
    hosts = np.zeros((len(load), topology.num_ranks), dtype=np.bool_)
    per_node = topology.ranks_per_node
    room = per_node * slots_per_rank
    nodes = pack(load, np.arange(len(load)), topology.num_nodes, min(room, len(load)))
    for node, experts in enumerate(nodes):
        copies = replicate(load[experts], room, most=per_node)
        items = np.repeat(experts, copies)
        share = np.repeat(load[experts] / copies, copies)
        ranks = pack(share, items, per_node, slots_per_rank)
        for local_rank, held in enumerate(ranks):
            hosts[held, node * per_node + local_rank] = True
    return hosts


def replicate(load: NDArray[np.float64], room: int, *, most: int) -> NDArray[np.int64]:
    """Copies of each expert: every further one goes where the load of a copy is highest."""
    copies = np.ones(len(load), dtype=np.int64)
    if not len(load):  # a node without experts: there are more nodes
        return copies
    for _ in range(room - len(load)):
        share = np.where(copies < most, load / copies, -1.0)
        if share.max() < 0:
            break
        copies[share.argmax()] += 1
    return copies


def pack(
    load: NDArray[np.float64], items: NDArray[np.int64], packs: int, room: int
) -> list[list[int]]:
    """Items by falling load, each to the lightest pack with room that does not hold it yet.

    Packs are kept equally full as far as the number of items allows. A copy that every pack with
    room holds already is left out.
    """
    room = min(room, -(-len(items) // packs))
    held: list[list[int]] = [[] for _ in range(packs)]
    weight = np.zeros(packs)
    for item in np.argsort(-load, kind="stable"):
        expert = int(items[item])
        free = [p for p in range(packs) if len(held[p]) < room and expert not in held[p]]
        if free:
            lightest = min(free, key=lambda p: weight[p])
            held[lightest].append(expert)
            weight[lightest] += load[item]
    return held
