"""How far affinity can be relied on: from half to half, from text to text, from few tokens to many.

The ExFlow paper (arXiv 2401.08383) claims that a few thousand tokens are
enough and that the kind of text hardly matters; these are the figures to check it with.

Everything is measured on tokens that were not fitted. Two yardsticks:

* `correlation` of two texts' affinity: Pearson's, over all pairs (i, j) of experts at adjacent
  layers, of P(i, j) - P(i) P(j), so that load alone gives 0. Mean over layers.
* `kept`: share of transitions between layers (top-k: of all k * k pairs) that stay on a rank, under
  a quick placement fitted on one text and measured on another. 1/ranks for a random placement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from placement.affinity import count_transitions
from placement.trace import RoutingTrace, TraceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FEWEST_TOKENS = 1000
"""A text with fewer is left out of tables."""

FIRST_SIZE = 125
MAX_SWEEPS = 10


def describe_stability(
    trace: RoutingTrace, against: RoutingTrace | None = None, *, num_ranks: int = 4
) -> dict[str, Any]:
    """All stability figures of a trace, ready for JSON.

    Keys: `ranks`, `halves` (agreement of the two halves of its sequences), `domains` and `against`
    (see `agreement_table`; None if there is only one domain, or no other trace) and `convergence`.

    Raises:
        TraceError: the traces have one layer or sequence only, or do not fit each other.
    """
    _check(trace, against)
    domains = {name: trace.domain(name) for name in _large_domains(trace)}
    halves = agreement_table({"trace": trace}, num_ranks)
    return {
        "ranks": num_ranks,
        "halves": {name: halves[name][0][0] for name in ("correlation", "kept")},
        "domains": agreement_table(domains, num_ranks) if len(domains) > 1 else None,
        "against": None
        if against is None
        else agreement_table({"this": trace, "other": against}, num_ranks),
        "convergence": convergence(trace, num_ranks),
    }


def agreement_table(traces: Mapping[str, RoutingTrace], num_ranks: int) -> dict[str, Any]:
    """How what is fitted on each text holds on each.

    Every text is split in two by sequence. Row i, column j compares the first half of text i with
    the second half of text j, so that the diagonal is what the text itself leaves to chance, and
    the other entries are to be read against it.

    Returns:
        `names`, `tokens`, and the matrices `correlation` and `kept`; `transfer`, the mean over
        i != j of kept[i][j] / kept[j][j]: 1 if a placement for another text does as well.
    """
    halves = [trace.split() for trace in traces.values()]
    fitted = [count_transitions(first) for first, _ in halves]
    measured = [count_transitions(second) for _, second in halves]
    placements = [quick_placement(counts, num_ranks) for counts in fitted]
    correlation = [[correlate(a, b) for b in measured] for a in fitted]
    share = np.array([[kept(ranks, counts) for counts in measured] for ranks in placements])
    ratio = share / share.diagonal()
    apart = ~np.eye(len(share), dtype=bool)
    return {
        "names": list(traces),
        "tokens": [trace.num_tokens for trace in traces.values()],
        "correlation": np.round(correlation, 4).tolist(),
        "kept": np.round(share, 4).tolist(),
        "transfer": round(float(ratio[apart].mean()), 4) if apart.any() else None,
    }


def convergence(trace: RoutingTrace, num_ranks: int, *, orders: int = 3) -> list[dict[str, float]]:
    """What the first n tokens of the fitting half tell of the held-out half, for growing n.

    The fitting half's sequences are put in several random orders; figures are means over them.

    Returns:
        For each n: `tokens`, `correlation` with the held-out half, `kept` on the held-out half.
    """
    fit, held_out = trace.split()
    target = count_transitions(held_out)
    sizes = _sizes(fit.num_tokens)
    found = np.zeros((orders, len(sizes), 2))
    for number in range(orders):
        shuffled = fit.select(_sequence_order(fit, seed=number))
        counts = np.zeros_like(target)
        for i, (start, stop) in enumerate(zip([0, *sizes], sizes, strict=False)):
            counts += count_transitions(shuffled.select(np.arange(start, stop)))
            share = kept(quick_placement(counts, num_ranks), target)
            found[number, i] = correlate(counts, target), share
    return [
        {"tokens": n, "correlation": round(float(c), 4), "kept": round(float(k), 4)}
        for n, (c, k) in zip(sizes, found.mean(axis=0), strict=True)
    ]


def correlate(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Correlation of two (steps, experts, experts) counts beyond load; see the module.

    >>> follows = np.array([[[9, 1], [1, 9]]])
    >>> round(correlate(follows, 5 * follows), 6), round(correlate(follows, follows[:, ::-1]), 6)
    (1.0, -1.0)
    """
    a, b = (_beyond_load(counts).reshape(len(counts), -1) for counts in (one, other))
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(scale, 1e-300)))


def _beyond_load(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """P(i, j) - P(i) P(j); its rows and columns sum to 0."""
    share = counts / np.maximum(counts.sum(axis=(1, 2), keepdims=True), 1)
    beyond: NDArray[np.float64] = share - share.sum(axis=2, keepdims=True) * share.sum(
        axis=1, keepdims=True
    )
    return beyond


def quick_placement(transitions: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """(layers, experts) ranks that keep transitions on a rank, as many experts on each rank.

    The first layer is placed in order, each next one by linear assignment to the ranks of the one
    before; then every layer anew between its two neighbours, until nothing changes. It measures
    how well affinity carries over and heeds no load; `placement.strategies` make plans to use.

    >>> quick_placement(np.array([[[0, 5], [5, 0]], [[5, 0], [0, 5]]]), 2).tolist()
    [[0, 1], [1, 0], [1, 0]]
    """
    steps, experts, _ = transitions.shape
    rank_of_slot = np.arange(experts) * num_ranks // experts
    ranks = np.tile(rank_of_slot, (steps + 1, 1))
    for layer in range(1, steps + 1):
        ranks[layer] = _assign(transitions[layer - 1].T @ _is_on(ranks[layer - 1], num_ranks))
    for _ in range(MAX_SWEEPS):
        before = ranks.copy()
        for layer in range(steps + 1):
            gain = np.zeros((experts, num_ranks))
            if layer > 0:
                gain += transitions[layer - 1].T @ _is_on(ranks[layer - 1], num_ranks)
            if layer < steps:
                gain += transitions[layer] @ _is_on(ranks[layer + 1], num_ranks)
            ranks[layer] = _assign(gain)
        if np.array_equal(before, ranks):
            break
    return ranks


def _is_on(ranks: NDArray[np.int64], num_ranks: int) -> NDArray[np.float64]:
    """(experts, ranks) 1 where an expert is."""
    return np.asarray(ranks[:, None] == np.arange(num_ranks), dtype=np.float64)


def _assign(gain: NDArray[np.float64]) -> NDArray[np.int64]:
    """(experts,) the rank of each, for the largest total of (experts, ranks) gains."""
    experts, num_ranks = gain.shape
    rank_of_slot = np.arange(experts) * num_ranks // experts
    _, slots = linear_sum_assignment(gain[:, rank_of_slot], maximize=True)
    return np.asarray(rank_of_slot[slots], dtype=np.int64)


def kept(ranks: NDArray[np.int64], transitions: NDArray[np.int64]) -> float:
    """Share of transitions whose two experts are on one rank.

    >>> kept(np.array([[0, 1], [0, 1]]), np.array([[[3, 1], [2, 4]]]))
    0.7
    """
    stays = ranks[:-1, :, None] == ranks[1:, None, :]
    return float((transitions * stays).sum() / max(1, transitions.sum()))


def _check(trace: RoutingTrace, against: RoutingTrace | None) -> None:
    if trace.num_layers < 2:
        msg = "affinity is between MoE layers, the trace has one; profile a deeper model"
        raise TraceError(msg)
    if against is None:
        return
    difference = trace.difference(against, names=("one", "the other"))
    if difference is not None:
        msg = f"the traces are of different models: {difference}; profile both texts with one model"
        raise TraceError(msg)


def _large_domains(trace: RoutingTrace) -> list[str]:
    """Domains with tokens enough, and more than one sequence to split."""
    if trace.domain_ids is None:
        return []
    names = []
    for number, name in enumerate(trace.domains):
        mine = trace.domain_ids == number
        if mine.sum() >= FEWEST_TOKENS and len(np.unique(trace.sequence_ids[mine])) > 1:
            names.append(name)
    return names


def _sizes(tokens: int) -> list[int]:
    """FIRST_SIZE doubled until `tokens`, which is the last.

    >>> _sizes(600)
    [125, 250, 500, 600]
    """
    sizes = []
    size = FIRST_SIZE
    while size < tokens:
        sizes.append(size)
        size *= 2
    return [*sizes, tokens]


def _sequence_order(trace: RoutingTrace, *, seed: int) -> NDArray[np.int64]:
    """Token indices, sequences in random order and each sequence's tokens as they were."""
    sequences, which = np.unique(trace.sequence_ids, return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(sequences))
    return np.argsort(place[which], kind="stable")
