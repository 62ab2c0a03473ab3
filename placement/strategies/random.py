"""random: every layer shuffled by itself; what a placement without knowledge is worth."""

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
    """The linear placement of shuffled experts, layer by layer; no replicas."""
    options = options or PlacementOptions()
    slots_per_rank_for(trace, topology, slots_per_rank)
    rng = np.random.default_rng(options.seed)
    rank = np.arange(trace.num_experts) * topology.num_ranks // trace.num_experts
    return PlacementPlan.from_rank_of_expert(
        np.stack([rng.permutation(rank) for _ in range(trace.num_layers)]),
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="random", seed=options.seed),
    )
