"""linear: experts in order, the first ones on rank 0. What every engine does by default."""

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
    """Contiguous experts on every rank; no replicas. Four experts on two ranks: 0 1 | 2 3."""
    slots_per_rank_for(trace, topology, slots_per_rank)
    rank = np.arange(trace.num_experts) * topology.num_ranks // trace.num_experts
    return PlacementPlan.from_rank_of_expert(
        np.tile(rank, (trace.num_layers, 1)),
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="linear"),
    )
