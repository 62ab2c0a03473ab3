"""affinity: the fewest rows that the protocol sends for the trace's tokens, under a load cap.

Simulated annealing on the true cost: every change of a layout is priced by routing again the tokens
that use the experts concerned, by the same rules as `placement.traffic`, owners and replicas
included. Changes: two experts of a layer swap ranks; with spare slots a replica is added or moves.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from placement.plan import PlacementPlan, Strategy
from placement.search.caps import expected_imbalance
from placement.search.solve import Search, solve
from placement.search.state import hosts_of, make_layout, make_machine, make_tokens, token_order
from placement.search.walk import total_cost
from placement.strategies.options import PlacementOptions, StrategyError, slots_per_rank_for
from placement.traffic import imbalance_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace

DEFAULT_MAX_IMBALANCE = 1.15


def place(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> PlacementPlan:
    """The plan with the fewest rows that annealing finds.

    Raises:
        StrategyError: if the slots cannot hold the experts, or no plan keeps `max_imbalance`.
    """
    options = options or PlacementOptions()
    num_slots = slots_per_rank_for(trace, topology, slots_per_rank)
    search = _start(trace, topology, num_slots, options)
    cap = options.max_imbalance or DEFAULT_MAX_IMBALANCE
    solve(search, cap=cap, node_cap=_node_cap(cap), effort=options.effort)
    flow = search.flow()
    if options.max_imbalance is not None:
        _check_cap(flow.load, options.max_imbalance, trace)
    plan = PlacementPlan.from_hosts(
        hosts_of(search.layout, trace.num_experts),
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(
            name="affinity",
            seed=options.seed,
            options=options.summary(slots_per_rank=num_slots, max_imbalance=cap),
        ),
    )
    predicted = {
        "cost_per_token": round(total_cost(search.tokens, flow) / trace.num_tokens, 4),
        "imbalance_mean": round(_expected_imbalance(search), 4),
    }
    return replace(plan, predicted=predicted)


def _start(
    trace: RoutingTrace, topology: Topology, num_slots: int, options: PlacementOptions
) -> Search:
    width = topology.num_ranks
    intra = options.intra_node_cost if topology.num_nodes > 1 else 1.0
    sequence = np.unique(trace.sequence_ids, return_inverse=True)[1]
    return Search(
        tokens=make_tokens(trace, num_ranks=width, seed=options.seed),
        machine=make_machine(topology, domain=options.domain_size, intra=intra, inter=1.0),
        layout=make_layout(_linear_hosts(trace, width), slots_per_rank=num_slots),
        sequence=sequence[token_order(trace, seed=options.seed)],
        replicas=num_slots * width > trace.num_experts,
        seed=options.seed,
        deadline=None if options.time_limit is None else time.monotonic() + options.time_limit,
    )


def _expected_imbalance(search: Search) -> float:
    draws = expected_imbalance(search.flow(), search.sequence, seed=search.seed)
    return float(draws.mean())


def _linear_hosts(trace: RoutingTrace, width: int) -> NDArray[np.bool_]:
    rank = np.arange(trace.num_experts) * width // trace.num_experts
    hosts = rank[:, None] == np.arange(width)
    return np.tile(hosts, (trace.num_layers, 1, 1))


def _node_cap(cap: float) -> float:
    """Nodes are to be more even than ranks: half the excess."""
    return 1 + (cap - 1) / 2


def _check_cap(load: NDArray[np.float64], cap: float, trace: RoutingTrace) -> None:
    worst = imbalance_of(load)
    layer = int(worst.argmax())
    if worst[layer] > cap:
        msg = (
            f"no plan found with max / mean load within {cap} at every layer: layer "
            f"{trace.layer_ids[layer]} reaches {worst[layer]:.3f}; allow a higher --max-imbalance "
            f"or more --slots-per-rank"
        )
        raise StrategyError(msg)
