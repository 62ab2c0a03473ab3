"""What a routing trace says about affinity, in numbers; each is defined at its function.

Mutual information and entropies are taken of counts as they are, which overstates affinity when
tokens are few: under independence the expected mutual information is about (E - 1)^2 / 2N nats for
E experts and N tokens, not 0. So each figure comes with nulls that have the same bias: the same
trace with its tokens shuffled in each layer (`null`), and shuffled only among the tokens of their
own sequence (`null_within_sequence`). What lies above the second is the affinity of single tokens;
what lies between the two is what a sequence's tokens share, its topic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.affinity import AffinityGraph, count_pairs, count_transitions
from placement.trace import RoutingTrace, TraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def describe(trace: RoutingTrace) -> dict[str, Any]:
    """All figures of one trace, ready for JSON.

    Keys: `model`, `phase`, `tokens`, `sequences`, `domains`, `layer_ids`, `experts`, `top_k`,
    `load_skew`, `concentration`, `mutual_information` (`top1`: the first choices only, `topk`: all
    pairs of choices), `coactivation`, which is None for top-1, and `foretold`, which is None where
    the trace foretells nothing.

    Raises:
        TraceError: the trace has one layer only.
    """
    if trace.num_layers < 2:
        msg = "affinity is between MoE layers, and the trace has only one"
        raise TraceError(msg)
    graph = AffinityGraph.from_trace(trace)
    shuffled, within = trace.shuffled_layers(), shuffled_within_sequences(trace)
    null, null_within = count_transitions(shuffled), count_transitions(within)
    firsts = [count_transitions(t.top1()) for t in (trace, shuffled, within)]
    return {
        "model": trace.model,
        "phase": trace.phase,
        "tokens": trace.num_tokens,
        "sequences": trace.num_sequences,
        "domains": domain_sizes(trace),
        "layer_ids": list(trace.layer_ids),
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "load_skew": _summary(load_skew(graph.load)),
        "concentration": {
            name: _summary(values, null=concentration(null)[name])
            for name, values in concentration(graph.transitions).items()
        },
        "mutual_information": {
            "top1": _information(*firsts),
            "topk": _information(graph.transitions, null, null_within),
        },
        "coactivation": _coactivation(trace, graph) if trace.top_k > 1 else None,
        "foretold": foretold_share(trace),
    }


def domain_sizes(trace: RoutingTrace) -> dict[str, int]:
    """Tokens by domain; empty if the trace names none."""
    if trace.domain_ids is None:
        return {}
    sizes = np.bincount(trace.domain_ids, minlength=len(trace.domains)).tolist()
    return dict(zip(trace.domains, sizes, strict=True))


def load_skew(load: NDArray[np.int64]) -> NDArray[np.float64]:
    """(layers,) busiest expert over mean expert: 1 is even, E is all on one.

    >>> load_skew(np.array([[4, 2, 1, 1]])).tolist()
    [2.0]
    """
    skew: NDArray[np.float64] = load.max(axis=1) / load.mean(axis=1)
    return skew


def concentration(transitions: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """How few experts follow an expert, from P(j next | i now); each (steps,).

    `top_successor`: probability of the likeliest successor, mean over tokens; 1/E for no affinity.
    `effective_successors`: exp(H(next | now)), the number of equally likely successors that would
    be as hard to guess. `normalised_entropy`: H(next | now) / log E, 0 to 1.
    With top-k routing the k experts of the next layer share the probability.

    >>> {name: values.round(2).tolist() for name, values in
    ...  concentration(np.array([[[3, 1], [0, 4]]])).items()}
    {'top_successor': [0.88], 'effective_successors': [1.32], 'normalised_entropy': [0.41]}
    """
    share = transitions / np.maximum(transitions.sum(axis=(1, 2), keepdims=True), 1)
    entropy = _entropy(share) - _entropy(share.sum(axis=2, keepdims=True))
    return {
        "top_successor": share.max(axis=2).sum(axis=1),
        "effective_successors": np.exp(entropy),
        "normalised_entropy": entropy / np.log(transitions.shape[1]),
    }


def mutual_information(transitions: NDArray[np.int64]) -> NDArray[np.float64]:
    """(steps,) normalised mutual information of experts at adjacent layers.

    I(X; Y) / sqrt(H(X) H(Y)) for the pair (expert now, expert next): 0 if the next expert does not
    depend on this one, 1 if each settles the other.

    >>> mutual_information(np.array([[[5, 0], [0, 5]], [[4, 4], [1, 1]]])).round(6).tolist()
    [1.0, 0.0]
    """
    share = transitions / np.maximum(transitions.sum(axis=(1, 2), keepdims=True), 1)
    now = _entropy(share.sum(axis=2, keepdims=True))
    after = _entropy(share.sum(axis=1, keepdims=True))
    information = np.maximum(now + after - _entropy(share), 0)
    scale = np.sqrt(now * after)
    return np.divide(information, scale, out=np.zeros_like(scale), where=scale > 0)


def coactivation_excess(coactivation: NDArray[np.int64]) -> NDArray[np.float64]:
    """(layers,) share of a token's expert pairs that load alone does not explain.

    Total variation distance between the pairs' distribution q(i, j), i != j, and one of the same
    loads in which choices are independent, r(i, j) ~ w_i w_j: 0 if experts pair at random, 1 if no
    expected pair ever occurs. The w are fitted so that each expert has its true number of pairs.

    >>> pairs = [[0, 6, 0, 0], [6, 0, 0, 0], [0, 0, 0, 6], [0, 0, 6, 0]]     # 0 with 1, 2 with 3
    >>> coactivation_excess(np.array([pairs])).round(3).tolist()     # 1/3 of pairs are expected
    [0.667]
    """
    total = np.maximum(coactivation.sum(axis=(1, 2), keepdims=True), 1)
    share = coactivation / total
    marginal = share.sum(axis=2)
    off_diagonal = 1.0 - np.eye(coactivation.shape[1])
    weight = marginal.copy()
    for _ in range(50):
        partners = (weight[:, None, :] * off_diagonal).sum(axis=2)
        weight = np.sqrt(weight * np.divide(marginal, partners, where=partners > 0, out=weight * 0))
    expected = weight[:, :, None] * weight[:, None, :] * off_diagonal
    distance: NDArray[np.float64] = np.abs(share - expected).sum(axis=(1, 2)) / 2
    return distance


def shuffled_within_sequences(trace: RoutingTrace, seed: int = 0) -> RoutingTrace:
    """A null that keeps topics: in each layer, tokens permuted among those of their sequence."""
    rng = np.random.default_rng(seed)
    places = np.argsort(trace.sequence_ids, kind="stable")
    ids = np.empty_like(trace.expert_ids)
    for layer in range(trace.num_layers):
        order = np.lexsort((rng.random(trace.num_tokens), trace.sequence_ids))
        ids[places, layer] = trace.expert_ids[order, layer]
    return replace(trace, expert_ids=ids, expert_weights=None, foretold_ids=None)


def foretold_share(trace: RoutingTrace) -> dict[str, float] | None:
    """How many of the first MoE layer's choices the token alone foretells (`foretold_ids`).

    `share` of all choices, and `null`: the same with what is foretold dealt to tokens at random.
    """
    if trace.foretold_ids is None:
        return None
    dealt = np.random.default_rng(0).permutation(trace.foretold_ids)
    return {
        name: round(float(_is_in(trace.expert_ids[:, 0], ids).mean()), 5)
        for name, ids in (("share", trace.foretold_ids), ("null", dealt))
    }


def _is_in(ids: NDArray[np.int16], among: NDArray[np.int16]) -> NDArray[np.bool_]:
    """(T, K) whether each of a token's experts is among its others."""
    found: NDArray[np.bool_] = (ids[:, :, None] == among[:, None, :]).any(axis=2)
    return found


def _entropy(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """(steps,) entropy in nats of (steps, a, b) distributions."""
    logs = np.log(share, where=share > 0, out=np.zeros_like(share))
    entropy: NDArray[np.float64] = -(share * logs).sum(axis=(1, 2))
    return entropy


def _information(
    transitions: NDArray[np.int64], null: NDArray[np.int64], within: NDArray[np.int64]
) -> dict[str, Any]:
    return _summary(
        mutual_information(transitions),
        null=mutual_information(null),
        null_within_sequence=mutual_information(within),
    )


def _coactivation(trace: RoutingTrace, graph: AffinityGraph) -> dict[str, Any]:
    """The excess and its null: all choices of a layer dealt to tokens at random."""
    rng = np.random.default_rng(0)
    null = np.zeros_like(graph.coactivation)
    for layer in range(trace.num_layers):
        dealt_KT = rng.permutation(trace.expert_ids[:, layer].ravel()).reshape(trace.top_k, -1)
        for slot in range(trace.top_k):
            others = np.delete(dealt_KT, slot, axis=0)
            null[layer] += count_pairs(dealt_KT[slot : slot + 1], others, trace.num_experts)
        np.fill_diagonal(null[layer], 0)
    return _summary(coactivation_excess(graph.coactivation), null=coactivation_excess(null))


def _summary(values: NDArray[np.float64], **nulls: NDArray[np.float64]) -> dict[str, Any]:
    """Mean, extremes and all values, with the mean of each null."""
    rounded = np.round(values, 4)
    found = {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}
    means = {name: float(null.mean()) for name, null in nulls.items()}
    return {
        **{name: round(value, 5) for name, value in (found | means).items()},
        "per_layer": rounded.tolist(),
    }
