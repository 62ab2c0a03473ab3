"""Several kinds of text, one plan: weights that serve them alike, and what a shift costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.strategies import PlacementOptions, get_strategy
from placement.traffic import count_traffic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.plan import PlacementPlan
    from placement.topology import Topology
    from placement.trace import RoutingTrace

ROUNDS, HASTE = 3, 2.0
SPLITS = 5


def fair_weights(
    trace: RoutingTrace,
    group: NDArray[np.int64],
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> NDArray[np.float32]:
    """Weights with which one plan keeps about the same share of what each group could gain.

    A group that would lose most counts for more in the next of a few rounds. Equal totals would
    serve best the group whose routing the others share most.

    Args:
        trace: tokens of all groups.
        group: (tokens,) group of each token, counted from 0.
        topology: nodes and ranks.
        slots_per_rank: experts a rank can hold.
        options: of `affinity`.

    Returns:
        (tokens,) of mean 1.
    """
    options = replace(options or PlacementOptions(), token_weights=None)
    place = get_strategy("affinity")
    parts = [trace.select(group == g) for g in range(int(group.max()) + 1)]
    own = [place(p, topology, slots_per_rank=slots_per_rank, options=options) for p in parts]
    linear = get_strategy("linear")(trace, topology)
    best = np.array([gain_of(p, linear, plan) for p, plan in zip(parts, own, strict=True)])
    weights = even_weights(group)
    for _ in range(ROUNDS):
        if options.interrupt is not None and options.interrupt.is_set():
            break
        weighted = replace(options, token_weights=weights)
        plan = place(trace, topology, slots_per_rank=slots_per_rank, options=weighted)
        found = np.array([gain_of(p, linear, plan) for p in parts])
        kept = np.where(best > 0, np.maximum(found, 1e-3) / np.maximum(best, 1e-3), 1.0)
        weights = weights * (kept.max() / kept)[group] ** HASTE
        weights = (weights / weights.mean()).astype(np.float32)
    return weights


def even_weights(group: NDArray[np.int64]) -> NDArray[np.float32]:
    """(tokens,) weights that give every group the same total."""
    counts = np.bincount(group)
    return (len(group) / np.count_nonzero(counts) / counts[group]).astype(np.float32)


def compare_weights(
    trace: RoutingTrace, topology: Topology, *, options: PlacementOptions | None = None
) -> dict[str, dict[str, float]]:
    """Whether domains should count the same, told by the trace alone.

    Where the next text may be of another mix, plans of domains that count the same are evener
    there; where domains are alike and some small, they are fitted to the chance of a few sequences.

    Returns:
        By weights, "none" and "even": rows and mean imbalance of plans of one half of the sequences
        on the other, mean over several splits.
    """
    options, place = options or PlacementOptions(), get_strategy("affinity")
    found: dict[str, list[tuple[float, float]]] = {"none": [], "even": []}
    for seed in range(1, SPLITS + 1):
        fit, other = trace.split(seed)
        weights = {"none": None, "even": even_weights(domains_of(fit))}
        for name, token_weights in weights.items():
            plan = place(fit, topology, options=replace(options, token_weights=token_weights))
            traffic = count_traffic(other, plan)
            rows = traffic.rows_per_token()["total"]
            found[name].append((rows, traffic.imbalance()["mean"]))
    means = {name: np.mean(figures, axis=0).tolist() for name, figures in found.items()}
    return {name: {"rows": rows, "imbalance": load} for name, (rows, load) in means.items()}


def domains_of(trace: RoutingTrace) -> NDArray[np.int64]:
    """(tokens,) domain of each token, counted from 0 without gaps; one for all if none is named."""
    if trace.domain_ids is None:
        return np.zeros(trace.num_tokens, dtype=np.int64)
    return np.unique(trace.domain_ids, return_inverse=True)[1]


def domain_shift(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
    min_sequences: int = 8,
) -> dict[str, Any]:
    """Gain over linear of plans fitted on each domain, and on all, measured on each domain.

    Each domain is split by sequence; domains with fewer than `min_sequences` are left out. The plan
    for all domains has `fair_weights`.

    Returns:
        `domains`; by fitted domain ("all" last), of each measured domain: `gain`; `kept`, the gain
        as a share of the gain of the domain's own plan; `imbalance`, mean over layers.
    """
    names = [d for d in trace.domains if _sequences_of(trace, d) >= min_sequences]
    if not names:
        return {"domains": [], "gain": {}, "kept": {}, "imbalance": {}}
    halves = [trace.domain(name).split() for name in names]
    options = options or PlacementOptions()
    common: dict[str, Any] = {"slots_per_rank": slots_per_rank, "options": options}
    place = get_strategy("affinity")
    base = get_strategy("linear")(trace, topology)
    plans = {n: place(fit, topology, **common) for n, (fit, _) in zip(names, halves, strict=True)}
    group = np.full(trace.num_tokens, -1)
    for index, (name, (fit, _)) in enumerate(zip(names, halves, strict=True)):
        of_domain = trace.domain_ids == trace.domains.index(name)
        group[of_domain & np.isin(trace.sequence_ids, fit.sequence_ids)] = index
    everything = trace.select(group >= 0)
    weights = fair_weights(everything, group[group >= 0], topology, **common)
    weighted = replace(options, token_weights=weights)
    plans["all"] = place(everything, topology, slots_per_rank=slots_per_rank, options=weighted)
    held_out = {name: half for name, (_, half) in zip(names, halves, strict=True)}
    gain = {f: {n: gain_of(held_out[n], base, p) for n in names} for f, p in plans.items()}
    imbalance = {
        f: {n: count_traffic(held_out[n], p).imbalance()["mean"] for n in names}
        for f, p in plans.items()
    }
    kept = {
        fitted: {name: row[name] / gain[name][name] if gain[name][name] else 1.0 for name in names}
        for fitted, row in gain.items()
    }
    return {"domains": names, "gain": gain, "kept": kept, "imbalance": imbalance}


def gain_of(trace: RoutingTrace, base: PlacementPlan, plan: PlacementPlan) -> float:
    """Share of the rows of `base` that a plan saves, both under `coherent`."""
    rows = [count_traffic(trace, p).rows_per_token()["total"] for p in (base, plan)]
    return 1 - rows[1] / rows[0] if rows[0] else 0.0


def _sequences_of(trace: RoutingTrace, domain: str) -> int:
    if trace.domain_ids is None:
        return 0
    of_domain = trace.domain_ids == trace.domains.index(domain)
    return len(np.unique(trace.sequence_ids[of_domain]))
