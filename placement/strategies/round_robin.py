"""round_robin: expert e on rank e modulo the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.plan import PlacementPlan, Strategy
from placement.strategies.options import PlacementOptions, slots_per_rank_for

if TYPE_CHECKING:
    from placement.topology import Topology
    from placement.trace import RoutingTrace


def place(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> PlacementPlan:
    """Experts dealt like cards; no replicas. Four experts on two ranks: 0 2 | 1 3."""
    slots_per_rank_for(trace, topology, slots_per_rank)
    rank = np.arange(trace.num_experts) % topology.num_ranks
    return PlacementPlan.from_rank_of_expert(
        np.tile(rank, (trace.num_layers, 1)),
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="round_robin"),
    )
