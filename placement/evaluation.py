"""What plans are worth: figures on a trace, strategies on held-out tokens, the null, the shift."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.strategies import PlacementOptions, StrategyError, get_strategy
from placement.timing import rows_by_kind
from placement.traffic import count_traffic, crossing_rate, imbalance_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from placement.plan import PlacementPlan
    from placement.topology import Topology
    from placement.trace import RoutingTrace
    from placement.traffic import Protocol, Traffic

DRAWS = 1000
LEAST_MEAN = 1.005


def measure(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    protocol: Protocol = "coherent",
    coherence_domain: int | None = None,
    backend: str = "exflow",
    row_bytes: int | None = None,
    kv_bytes: int | None = None,
) -> dict[str, Any]:
    """The figures of `exflow simulate` for one plan.

    Args:
        trace: routing to count on.
        plan: the plan.
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None means all.
        backend: whose rows "sent" tells, inside nodes and between them.
        row_bytes: bytes of a row; without it the figures in bytes are None.
        kv_bytes: bytes of one token's keys and values at one layer.
    """
    traffic = count_traffic(trace, plan, protocol=protocol, coherence_domain=coherence_domain)
    rows = traffic.rows_per_token()
    domain = 1 if protocol == "home" else coherence_domain or plan.num_ranks
    kv = None if kv_bytes is None else kv_bytes * plan.num_layers * (domain - 1)
    return {
        "strategy": plan.strategy.name,
        "rows_per_token": rows,
        "sent": rows_by_kind(
            trace,
            plan,
            backend=backend,
            protocol=protocol,
            coherence_domain=coherence_domain,
            traffic=traffic,
        ),
        "crossing_rate": crossing_rate(trace, plan),
        "imbalance": traffic.imbalance(),
        "node_imbalance": node_imbalance(traffic, plan.topology),
        "kv_bytes_per_token": kv,
        "bytes_per_token": None if row_bytes is None else rows["total"] * row_bytes + (kv or 0),
    }


def node_imbalance(traffic: Traffic, topology: Topology) -> float:
    """Max / mean load over nodes, mean over layers."""
    by_node = traffic.load.reshape(-1, topology.num_nodes, topology.ranks_per_node).sum(axis=2)
    return float(imbalance_of(by_node).mean())


def compare_strategies(
    trace: RoutingTrace,
    topology: Topology,
    names: Sequence[str],
    *,
    slots_per_rank: int | None,
    options: PlacementOptions,
) -> list[dict[str, Any]]:
    """Fits every strategy on half of the sequences and measures it on the others.

    The first row is linear placement under `home`, what engines do by default. A strategy that
    finds no plan has a row that says why.
    """
    fit, held_out = trace.split()
    if options.token_weights is not None:
        fits = np.isin(trace.sequence_ids, np.unique(fit.sequence_ids))
        options = replace(options, token_weights=options.token_weights[fits])
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            plan = get_strategy(name)(fit, topology, slots_per_rank=slots_per_rank, options=options)
        except StrategyError as error:
            rows.append({"plan": name, "error": str(error)})
            continue
        for protocol in _protocols(name, options.protocol):
            domain = options.coherence_domain if protocol == "coherent" else None
            figures = measure(
                held_out,
                plan,
                protocol=protocol,
                coherence_domain=domain,
                backend=options.backend,
            )
            rows.append({"plan": f"{name}, {protocol}", **figures})
    return rows


def _protocols(name: str, protocol: Protocol) -> list[Protocol]:
    both: list[Protocol] = ["home", protocol] if name == "linear" else [protocol]
    return list(dict.fromkeys(both))


def bootstrap_change(
    trace: RoutingTrace, before: Traffic, after: Traffic, *, seed: int = 0
) -> dict[str, float]:
    """Relative change of rows per token, with the 95% interval of a bootstrap over sequences.

    Draws without rows before have no relative change and are left out.
    """
    index = np.unique(trace.sequence_ids, return_inverse=True)[1]
    sums = np.stack([np.bincount(index, weights=t.rows_of_token) for t in (before, after)])
    if not sums[0].any():
        return dict.fromkeys(("change", "low", "high"), np.inf if sums[1].any() else 0.0)
    count = sums.shape[1]
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) @ sums.T
    draws = draws[draws[:, 0] > 0]
    changes = draws[:, 1] / draws[:, 0] - 1
    low, high = np.quantile(changes, [0.025, 0.975])
    return {
        "change": float(sums[1].sum() / sums[0].sum() - 1),
        "low": float(low),
        "high": float(high),
    }


def evaluate_null(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int | None = None,
    options: PlacementOptions | None = None,
) -> dict[str, float]:
    """Change of the top-1 path's rows by `affinity` where no affinity between layers is left.

    Tokens are shuffled in each layer, in the fitting and in the held-out half. The first choices
    alone are looked at, since tokens keep their experts of one layer together. Load is left: the
    plan is compared with `balanced`, which knows nothing else, at the imbalance of `balanced` on
    the fitting half, since experts that are used much and share a rank save rows by themselves.
    """
    halves = enumerate(trace.top1().split())
    fit, held_out = (half.shuffled_layers(seed) for seed, half in halves)
    balanced = get_strategy("balanced")(fit, topology, slots_per_rank=slots_per_rank)
    mean = max(LEAST_MEAN, count_traffic(fit, balanced).imbalance()["mean"])
    even = replace(options or PlacementOptions(), max_imbalance=None, mean_imbalance=mean)
    affinity = get_strategy("affinity")(fit, topology, slots_per_rank=slots_per_rank, options=even)
    plans = balanced, affinity
    traffic = [count_traffic(held_out, plan) for plan in plans]
    return bootstrap_change(held_out, *traffic)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Figures of `measure` as text, one line a plan."""
    width = max(len(row["plan"]) for row in rows)
    base = next(sum(row["sent"].values()) for row in rows if "error" not in row)
    head = f"{'':{width}}  rows/token  vs first  inter-node  crossing  imbalance mean  max"
    return "\n".join([head, *(_line(row, width, base) for row in rows)])


def _line(row: Mapping[str, Any], width: int, base: float) -> str:
    if "error" in row:
        return f"{row['plan']:{width}}  {row['error']}"
    total = sum(row["sent"].values())
    change = f"{100 * (total / base - 1):+.1f}%" if base else "-"
    return (
        f"{row['plan']:{width}}  {total:10.2f}  {change:>8}  "
        f"{row['sent']['inter']:10.2f}  {row['crossing_rate']:8.3f}  "
        f"{row['imbalance']['mean']:14.3f}  {row['imbalance']['max']:.3f}"
    )
