"""affinity: the fewest rows that the protocol sends for the trace's tokens, under a load cap.

First without replicas on pair counts, then simulated annealing on the true cost: every change of a
layout is priced by routing again the tokens that use the experts concerned, by the same rules as
`placement.rules`, owners and replicas included. Changes: two experts of a layer exchange ranks;
with spare slots a replica is added or moves. More than 64 ranks: the same for nodes, then the
experts of a node go to its ranks by load. With `keep_groups` only the ranks of a plan are renamed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from placement.plan import PlacementPlan, Strategy
from placement.search.caps import Caps, expected_imbalance
from placement.search.generations import LEAST_EFFORT, SEARCHES, SHARE, solve_by_generations
from placement.search.pace import Pace
from placement.search.recombine import recombine
from placement.search.solve import VISITS, Search, solve
from placement.search.start import anneal_pairs
from placement.search.state import (
    hosts_of,
    make_layout,
    make_machine,
    make_tokens,
    token_order,
)
from placement.search.walk import MAX_RANKS, total_cost
from placement.strategies.large import place_by_node
from placement.strategies.options import PlacementOptions, StrategyError, slots_per_rank_for
from placement.timing import unit_of, why_no_gain
from placement.traffic import imbalance_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.plan import Outlook
    from placement.search.state import Machine, Tokens
    from placement.topology import Topology
    from placement.trace import RoutingTrace

DEFAULT_MAX_IMBALANCE = 1.2
NODE_SHARE_OF_EXCESS = 0.5
EVEN_MEAN, PARTS = 1.005, 10


def place(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> PlacementPlan:
    """The plan with the fewest rows that annealing finds.

    Without `options.max_imbalance` the cap is 1.2, or as near as a layer can come to it; with
    infinity there is none. The mean over layers is aimed at, on other tokens, within
    `options.mean_imbalance`, or the cap.

    Raises:
        StrategyError: if the slots cannot hold the experts, or no plan keeps `max_imbalance`.
    """
    options = options or PlacementOptions()
    if options.keep_groups:
        return _keep_groups(trace, topology, options)
    num_slots = slots_per_rank_for(trace, topology, slots_per_rank)
    _check_backend(options.backend, num_slots * topology.num_ranks > trace.num_experts)
    if topology.num_ranks > MAX_RANKS:
        return place_by_node(_place, trace, topology, num_slots, options)
    return _place(trace, topology, num_slots, options)


def _place(
    trace: RoutingTrace, topology: Topology, num_slots: int, options: PlacementOptions
) -> PlacementPlan:
    search = _solve(trace, topology, num_slots, options, _caps(options))
    return _planned(search, trace, topology, options)


def _keep_groups(
    trace: RoutingTrace, topology: Topology, options: PlacementOptions
) -> PlacementPlan:
    """The plan to start from with its ranks renamed at every layer, and an outlook."""
    if topology.num_ranks > MAX_RANKS:
        msg = f"keep_groups is for at most {MAX_RANKS} ranks, got {topology.num_ranks}"
        raise StrategyError(msg)
    assert options.start is not None
    num_slots = max(len(experts) for ranks in options.start.slots for experts in ranks)
    search = _start(trace, topology, num_slots, options, _pace(options))
    search.layout = recombine(
        search.tokens, search.machine, [search.layout], [search.flow()], np.inf
    )
    search.look_ahead(VISITS)
    return _planned(search, trace, topology, options)


def _planned(
    search: Search, trace: RoutingTrace, topology: Topology, options: PlacementOptions
) -> PlacementPlan:
    """The plan of a search that has ended."""
    cap, flow = options.max_imbalance, search.flow()
    if cap is None and not options.keep_groups:
        cap = _caps(options).rank
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
            options=options.summary(
                slots_per_rank=search.layout.slots.shape[2],
                max_imbalance=cap if cap is not None and np.isfinite(cap) else None,
                hurried=search.pace.was_hurried or None,
            ),
        ),
    )
    elsewhere = expected_imbalance(flow, search.sequence, seed=options.seed).mean()
    predicted = {
        "cost_per_token": round(total_cost(search.tokens, flow) / trace.num_tokens, 4),
        "imbalance_mean": round(float(imbalance_of(flow.load).mean()), 4),
        "imbalance_mean_elsewhere": round(float(elsewhere), 4),
    }
    return replace(plan, predicted=predicted, outlook=_tuples(search.machine.outlook))


def _solve(
    trace: RoutingTrace,
    topology: Topology,
    num_slots: int,
    options: PlacementOptions,
    caps: Caps,
) -> Search:
    """One search; with much effort, and where owners may be anywhere, generations of several."""
    is_free = options.domain_size in (None, topology.num_ranks) and options.start is None
    pace = _pace(options)
    if options.effort < LEAST_EFFORT or not is_free:
        search = _start(trace, topology, num_slots, options, pace)
        solve(search, wanted=caps, effort=options.effort)
        return search
    seeds = [
        replace(options, seed=options.seed + number, effort=options.effort * SHARE)
        for number in range(SEARCHES)
    ]
    searches = (_start(trace, topology, num_slots, own, pace) for own in seeds)
    return solve_by_generations(searches, wanted=caps, effort=options.effort)


def _pace(options: PlacementOptions) -> Pace:
    return Pace(
        time_limit=options.time_limit,
        interrupt=options.interrupt,
        shows=options.shows_progress,
    )


def _caps(options: PlacementOptions) -> Caps:
    mean = options.mean_imbalance
    rank = options.max_imbalance or max(DEFAULT_MAX_IMBALANCE, 2 * (mean or 1) - 1)
    mean = mean or rank
    return Caps(rank=rank, node=1 + (mean - 1) * NODE_SHARE_OF_EXCESS, mean=mean)


def _tuples(outlook: NDArray[np.int32]) -> Outlook:
    return tuple(tuple(tuple(row) for row in layer) for layer in outlook.tolist())


def _start(
    trace: RoutingTrace,
    topology: Topology,
    num_slots: int,
    options: PlacementOptions,
    pace: Pace,
) -> Search:
    # Where load is to be as even as it can be, what is left elsewhere is what sequences differ by,
    # and to even out their sum is not enough.
    is_even = (options.mean_imbalance or np.inf) <= EVEN_MEAN
    if options.domain_size == 1:
        trace = replace(trace, foretold_ids=None)  # tokens start at home
    tokens = make_tokens(
        trace,
        num_ranks=topology.num_ranks,
        seed=options.seed,
        weight=options.token_weights,
        parts=PARTS if is_even else 0,
    )
    intra = options.intra_node_cost if topology.num_nodes > 1 else 1.0
    machine = make_machine(
        topology,
        domain=options.domain_size,
        intra=intra,
        inter=1.0,
        unit=unit_of(options.backend),
    )
    if options.start is None:
        hosts = _fresh_hosts(trace, tokens, machine, options, pace)
    else:
        hosts = _hosts_of_start(options.start, trace, topology, num_slots)
    layout = make_layout(hosts, slots_per_rank=num_slots)
    sequence = np.unique(trace.sequence_ids, return_inverse=True)[1]
    return Search(
        tokens=tokens,
        machine=machine,
        layout=layout,
        origin=layout.hosts.copy(),
        sequence=sequence[token_order(trace, seed=options.seed)],
        seed=options.seed,
        replicas=num_slots * topology.num_ranks > trace.num_experts,
        spread=options.spread,
        looks_ahead=trace.top_k > 1 and options.domain_size != 1,
        max_moves=options.max_moves,
        pace=pace,
    )


def _fresh_hosts(
    trace: RoutingTrace,
    tokens: Tokens,
    machine: Machine,
    options: PlacementOptions,
    pace: Pace,
) -> NDArray[np.bool_]:
    rank_of = anneal_pairs(
        tokens,
        machine,
        num_experts=trace.num_experts,
        caps=_caps(options).within(),
        seed=options.seed,
        pace=pace,
        effort=options.effort,
    )
    hosts: NDArray[np.bool_] = rank_of[:, :, None] == np.arange(len(machine.node_of_rank))
    return hosts


def _hosts_of_start(
    plan: PlacementPlan, trace: RoutingTrace, topology: Topology, num_slots: int
) -> NDArray[np.bool_]:
    plan.check_for(
        model=trace.model,
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        num_ranks=topology.num_ranks,
    )
    fullest = max(len(experts) for ranks in plan.slots for experts in ranks)
    if fullest > num_slots:
        msg = (
            f"the plan to start from holds {fullest} experts on a rank, there are {num_slots} "
            f"slots; use --slots-per-rank {fullest} or more"
        )
        raise StrategyError(msg)
    return plan.hosts()


def _check_backend(backend: str, has_spare_slots: bool) -> None:
    """Affinity needs rows that depend on the placement.

    Raises:
        StrategyError: if a backend sends the same rows wherever experts are.
    """
    reason = why_no_gain(backend, has_copies=has_spare_slots)
    if reason is None:
        return
    msg = f"{reason}: only even load is left to gain; use --strategy balanced"
    if why_no_gain(backend, has_copies=True) is None:
        msg += ", or more --slots-per-rank for copies near the tokens"
    raise StrategyError(msg)


def _check_cap(load: NDArray[np.float64], cap: float, trace: RoutingTrace) -> None:
    worst = imbalance_of(load)
    layer = int(worst.argmax())
    if worst[layer] > cap:
        msg = (
            f"no plan found with max / mean load within {cap} at every layer: layer "
            f"{trace.layer_ids[layer]} reaches {worst[layer]:.4f}; allow a higher --max-imbalance "
            f"or more --slots-per-rank, or leave the cap to the strategy"
        )
        raise StrategyError(msg)
