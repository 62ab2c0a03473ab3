"""What no plan can beat: certified lower bounds on the rows that a protocol sends for a trace.

Small instances are solved exactly by branch and bound. Larger ones are relaxed. Let Z be the table
of which experts share a rank. For two neighbouring layers, or for one layer with itself, and ranks of
at most S slots without replicas: 0 <= Z <= 1, rows and columns of Z sum to at most S, and Z has
singular values of at most S, of which at most W are not 0. So for any split C = A + B of the pair
counts, and any u, v >= 0, the pairs that a plan brings together weigh

    <C, Z>  <=  S (sum u + sum v) + sum max(0, A - u - v)  +  S (the W largest singular values of B)

The first part alone (B = 0) is the transportation relaxation; the second alone, for one layer, is
the bound of Donath and Hoffman (1973). B, u and v are found by subgradient steps; whatever they
are, the bound holds.

Pairs become rows so. Top-1: a transition whose pair is not brought together is a row. Top-k: a
token whose K experts make c pairs on shared ranks touches at least alpha - beta c ranks, for the
lines (alpha, beta) below all partitions of K; every rank but one costs a row each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.affinity import AffinityGraph
from placement.exact import count_layouts, layer_layouts, least_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace
    from placement.traffic import Protocol

STEPS = 200
EXACT_LAYOUTS, EXACT_TREES, EXACT_TOKENS = 2000, 300_000, 5000


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound on rows per token, and how it was found: "exact", "spectral" or "budget"."""

    rows_per_token: float
    method: str

    def summary(self, rows_per_token: float) -> dict[str, Any]:
        """What a plan's file says; the gap is relative to the plan's rows."""
        gap = 1 - self.rows_per_token / rows_per_token if rows_per_token > 0 else 0.0
        return {
            "rows_per_token": round(self.rows_per_token, 4),
            "method": self.method,
            "gap": round(gap, 4),
        }


def lower_bound(
    trace: RoutingTrace,
    topology: Topology,
    *,
    slots_per_rank: int,
    protocol: Protocol = "coherent",
    coherence_domain: int | None = None,
    steps: int | None = None,
) -> Bound:
    """A bound on the rows of any plan with at most `slots_per_rank` experts a rank, without caps.

    Args:
        trace: the tokens.
        topology: the ranks.
        slots_per_rank: experts that a rank can hold.
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None means all.
        steps: subgradient steps of the relaxation; None: fewer for more experts.
    """
    width = topology.num_ranks
    if width == 1 or slots_per_rank >= trace.num_experts:
        return Bound(rows_per_token=0.0, method="exact")
    replicas = width * slots_per_rank > trace.num_experts
    if _is_small(trace, topology, slots_per_rank):
        least = least_rows(
            trace,
            topology,
            slots_per_rank=slots_per_rank,
            coherence_domain=1 if protocol == "home" else coherence_domain,
        )
        return Bound(rows_per_token=least / trace.num_tokens, method="exact")
    steps = steps or max(8, int(STEPS * min(1.0, (64 / trace.num_experts) ** 2)))
    graph = AffinityGraph.from_trace(trace)
    if replicas:
        rows = _fan_out(graph, trace.top_k, _kept_with_replicas(graph, width, slots_per_rank))
        return Bound(rows_per_token=2 * rows / trace.num_tokens, method="budget")
    if trace.top_k == 1:
        rows = _crossings(graph, topology, slots_per_rank, protocol, coherence_domain, steps)
        return Bound(rows_per_token=rows / trace.num_tokens, method="spectral")
    kept = most_kept(graph.coactivation.astype(np.float64), slots_per_rank, width, steps) / 2
    rows = _fan_out(graph, trace.top_k, kept)
    return Bound(rows_per_token=2 * rows / trace.num_tokens, method="spectral")


def _is_small(trace: RoutingTrace, topology: Topology, slots: int) -> bool:
    layouts = count_layouts(trace.num_experts, topology, slots)
    if layouts > EXACT_LAYOUTS or trace.num_tokens > EXACT_TOKENS:
        return False
    trees = len(layer_layouts(trace.num_experts, topology.num_ranks, slots)) ** trace.num_layers
    return bool(trees <= EXACT_TREES)


def _crossings(
    graph: AffinityGraph,
    topology: Topology,
    slots: int,
    protocol: Protocol,
    domain: int | None,
    steps: int,
) -> float:
    """Rows of the top-1 path; only a world-wide coherence domain ties them to the plan."""
    if protocol == "home" or domain not in (None, topology.num_ranks) or len(graph.load) < 2:
        return 0.0
    counts = graph.transitions.astype(np.float64)
    kept = most_kept(counts, slots, topology.num_ranks, steps)
    return float((counts.sum(axis=(1, 2)) - kept).clip(0).sum())


def transportation_bound(counts: NDArray[np.float64], slots: int) -> NDArray[np.float64]:
    """(P,) the most weight of (P, E, E) pairs that ranks can keep, each expert with `slots` others.

    Solved exactly as a linear program.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    experts = counts.shape[1]
    row, column = np.divmod(np.arange(experts * experts), experts)
    cells = np.tile(np.arange(experts * experts), 2)
    matrix = coo_array(
        (np.ones(2 * experts * experts), (np.concatenate([row, experts + column]), cells))
    ).tocsr()
    room = np.full(2 * experts, slots)
    solved = [linprog(-c.ravel(), A_ub=matrix, b_ub=room, bounds=(0, 1)) for c in counts]
    return np.array([-result.fun for result in solved])


def most_kept(
    counts: NDArray[np.float64], slots: int, ranks: int, steps: int = STEPS
) -> NDArray[np.float64]:
    """(P,) the most weight of (P, E, E) pairs that a placement without replicas can keep.

    Minimises the module's bound over B, u and v by Adam on subgradients; the best value of each
    table is kept.
    """
    scale = counts.max(axis=(1, 2), keepdims=True).clip(1e-12)
    table = counts / scale
    threshold = np.sort(table, axis=2)[:, :, -min(slots + 1, table.shape[2]), None]
    variables = [np.zeros_like(table), threshold / 2, threshold.transpose(0, 2, 1) / 2]
    best = table.sum(axis=(1, 2))
    first = [np.zeros_like(v) for v in variables]
    second = [np.zeros_like(v) for v in variables]
    for step in range(1, steps + 1):
        value, gradients = _bound_and_gradient(table, variables, slots, ranks)
        best = np.minimum(best, value)
        pace = 0.05 * (1 - step / (steps + 1))
        for v, g, m, s in zip(variables, gradients, first, second, strict=True):
            m += 0.1 * (g - m)
            s += 0.01 * (g * g - s)
            v -= pace * (m / (1 - 0.9**step)) / (np.sqrt(s / (1 - 0.99**step)) + 1e-9)
        for v in variables[1:]:
            np.maximum(v, 0, out=v)
    result: NDArray[np.float64] = best * scale[:, 0, 0]
    return result


def _bound_and_gradient(
    table: NDArray[np.float64], variables: list[NDArray[np.float64]], slots: int, ranks: int
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """(P,) value of the bound at B (P, E, E), u (P, E, 1), v (P, 1, E), and its subgradients."""
    spectral, u, v = variables
    left, sizes, right = np.linalg.svd(spectral)
    rest = table - spectral - u - v
    value = slots * (u.sum(axis=(1, 2)) + v.sum(axis=(1, 2)) + sizes[:, :ranks].sum(axis=1))
    value += np.maximum(rest, 0).sum(axis=(1, 2))
    taken = (rest > 0).astype(np.float64)
    shared = left[:, :, :ranks] @ right[:, :ranks]
    gradients = [
        slots * shared - taken,
        slots - taken.sum(axis=2, keepdims=True),
        slots - taken.sum(axis=1, keepdims=True),
    ]
    return value, gradients


def _kept_with_replicas(graph: AffinityGraph, ranks: int, slots: int) -> NDArray[np.float64]:
    """(L,) weight of as many pairs of a layer as all ranks together can hold, the heaviest."""
    room = ranks * slots * (slots - 1) // 2
    experts = graph.coactivation.shape[1]
    first, second = np.triu_indices(experts, 1)
    upper = graph.coactivation[:, first, second]
    heaviest = np.sort(upper, axis=1)[:, ::-1][:, :room]
    kept: NDArray[np.float64] = heaviest.sum(axis=1).astype(np.float64)
    return kept


def _fan_out(graph: AffinityGraph, top_k: int, kept: NDArray[np.float64]) -> float:
    """The fewest (ranks touched - 1) over all tokens and layers, if so many pairs are kept."""
    tokens = graph.num_tokens
    ranks = np.full(len(kept), float(tokens))
    for alpha, beta in partition_lines(top_k):
        ranks = np.maximum(ranks, alpha * tokens - beta * kept)
    return float((ranks - tokens).sum())


@cache
def partition_lines(top_k: int) -> tuple[tuple[float, float], ...]:
    """Lines (alpha, beta) with parts >= alpha - beta * pairs, for every partition of `top_k`.

    The edges of the lower convex hull of (pairs in a common part, number of parts).

    >>> partition_lines(3)
    ((3.0, 1.0), (2.5, 0.5))
    """
    fewest: dict[int, int] = {}
    for parts in _partitions(top_k, top_k):
        pairs = sum(p * (p - 1) // 2 for p in parts)
        fewest[pairs] = min(fewest.get(pairs, top_k), len(parts))
    points, lines, here = sorted(fewest.items()), [], (0, top_k)
    while here[0] < points[-1][0]:
        further = [p for p in points if p[0] > here[0]]
        beta, corner = max(((here[1] - p[1]) / (p[0] - here[0]), p) for p in further)
        lines.append((here[1] + beta * here[0], beta))
        here = corner
    return tuple(lines)


def _partitions(total: int, largest: int) -> list[tuple[int, ...]]:
    if total == 0:
        return [()]
    return [
        (part, *rest)
        for part in range(min(total, largest), 0, -1)
        for rest in _partitions(total - part, part)
    ]
