"""What plans are worth: figures on a trace, and strategies compared on held-out tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from placement.strategies import PlacementOptions, get_strategy
from placement.traffic import Protocol, count_traffic, crossing_rate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from placement.plan import PlacementPlan
    from placement.topology import Topology
    from placement.trace import RoutingTrace


def measure(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    protocol: Protocol = "coherent",
    coherence_domain: int | None = None,
    row_bytes: int | None = None,
    kv_bytes: int | None = None,
) -> dict[str, Any]:
    """The figures of `exflow simulate` for one plan.

    Args:
        trace: routing to count on.
        plan: the plan.
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None means all.
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
        "crossing_rate": crossing_rate(trace, plan),
        "imbalance": traffic.imbalance(),
        "kv_bytes_per_token": kv,
        "bytes_per_token": None if row_bytes is None else rows["total"] * row_bytes + (kv or 0),
    }


def compare_strategies(
    trace: RoutingTrace,
    topology: Topology,
    names: Sequence[str],
    *,
    slots_per_rank: int | None,
    options: PlacementOptions,
) -> list[dict[str, Any]]:
    """Fits every strategy on half of the sequences and measures it on the others.

    The first row is linear placement under `home`, what engines do by default.
    """
    fit, held_out = trace.split()
    rows = []
    for name in names:
        plan = get_strategy(name)(fit, topology, slots_per_rank=slots_per_rank, options=options)
        protocols: list[Protocol] = ["home", options.protocol] if name == "linear" else []
        for protocol in dict.fromkeys(protocols or [options.protocol]):
            figures = measure(
                held_out, plan, protocol=protocol, coherence_domain=options.coherence_domain
            )
            rows.append({"plan": f"{name}, {protocol}", **figures})
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Figures of `measure` as text, one line a plan."""
    width = max(len(row["plan"]) for row in rows)
    base = rows[0]["rows_per_token"]["total"]
    head = f"{'':{width}}  rows/token  vs first  inter-node  crossing  imbalance mean  max"
    return "\n".join([head, *(_line(row, width, base) for row in rows)])


def _line(row: Mapping[str, Any], width: int, base: float) -> str:
    total = row["rows_per_token"]["total"]
    change = f"{100 * (total / base - 1):+.1f}%" if base else "-"
    return (
        f"{row['plan']:{width}}  {total:10.2f}  {change:>8}  "
        f"{row['rows_per_token']['inter_node_dedup']:10.2f}  {row['crossing_rate']:8.3f}  "
        f"{row['imbalance']['mean']:14.3f}  {row['imbalance']['max']:.3f}"
    )
