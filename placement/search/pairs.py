"""Compiled: annealing on pair counts, without looking at tokens. Fast, and exact for top-1 paths.

The value of a layout without replicas is the weight of the pairs of experts that it brings
together: pairs of a layer that tokens use at once, and pairs of neighbouring layers that tokens use
one after the other. A pair on one node but two ranks is worth the share `node_share`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.search.jit import Array, Number, kernel
from placement.search.moves import draw

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.search.state import Tokens

DRAWS = 1 << 30


class Pairs(NamedTuple):
    """Pair weights and a layout without replicas.

    Attributes:
        within: float32 (L, E, E) weight of two experts of a layer, symmetric, diagonal 0.
        across: float32 (L - 1, E, E) weight of an expert and one of the next layer.
        back: float32 (L - 1, E, E) `across`, its last two axes exchanged.
        load: float64 (L, E) token load of an expert.
        node_of_rank: int64 (W,).
        node_share: float32 (1,) worth of a pair on one node but two ranks.
        rank_of: int64 (L, E).
        rank_pull: float32 (L, E, W) weight of an expert with the experts of a rank.
        node_pull: float32 (L, E, N) the same for nodes.
        rank_load: float64 (L, W) token load of a rank.
        cap: float64 (L,) on `rank_load`.
        even: float64 (L,) load of a rank from which on load has a price.
    """

    within: NDArray[np.float32]
    across: NDArray[np.float32]
    back: NDArray[np.float32]
    load: NDArray[np.float64]
    node_of_rank: NDArray[np.int64]
    node_share: NDArray[np.float32]
    rank_of: NDArray[np.int64]
    rank_pull: NDArray[np.float32]
    node_pull: NDArray[np.float32]
    rank_load: NDArray[np.float64]
    cap: NDArray[np.float64]
    even: NDArray[np.float64]


@kernel
def count_pairs(tokens: Tokens, within: Array, across: Array, back: Array) -> None:
    """Adds up pair counts; all three arrays start at zero."""
    layers, count, top_k = tokens.expert_ids.shape
    for layer in range(layers):
        for token in range(count):
            weight = tokens.weight[token]
            for k in range(top_k):
                a = tokens.expert_ids[layer, token, k]
                for j in range(k):
                    b = tokens.expert_ids[layer, token, j]
                    within[layer, a, b] += weight
                    within[layer, b, a] += weight
                if layer + 1 < layers:
                    for j in range(top_k):
                        b = tokens.expert_ids[layer + 1, token, j]
                        across[layer, a, b] += weight
                        back[layer, b, a] += weight


@kernel
def add_pull(pairs: Pairs, layer: int, expert: int, rank: int, sign: Number) -> None:
    """Adds an expert on a rank to (or with -1 takes it from) what pulls the others."""
    layers, experts = pairs.rank_of.shape
    node = pairs.node_of_rank[rank]
    for e in range(experts):
        weight = sign * pairs.within[layer, expert, e]
        pairs.rank_pull[layer, e, rank] += weight
        pairs.node_pull[layer, e, node] += weight
        if layer > 0:
            weight = sign * pairs.back[layer - 1, expert, e]
            pairs.rank_pull[layer - 1, e, rank] += weight
            pairs.node_pull[layer - 1, e, node] += weight
        if layer + 1 < layers:
            weight = sign * pairs.across[layer, expert, e]
            pairs.rank_pull[layer + 1, e, rank] += weight
            pairs.node_pull[layer + 1, e, node] += weight


@kernel
def fill_pull(pairs: Pairs) -> None:
    """Works out the pull of all experts; both tables start at zero."""
    layers, experts = pairs.rank_of.shape
    for layer in range(layers):
        for expert in range(experts):
            add_pull(pairs, layer, expert, pairs.rank_of[layer, expert], np.float32(1.0))


@kernel
def swap_gain(pairs: Pairs, layer: int, a: int, b: int) -> Number:
    """What exchanging two experts of a layer gains."""
    p, q = pairs.rank_of[layer, a], pairs.rank_of[layer, b]
    near, share = pairs.rank_pull[layer], pairs.node_share[0]
    both = np.float32(2.0) * pairs.within[layer, a, b]
    gain = near[a, q] - near[a, p] + near[b, p] - near[b, q] - both
    gain = (np.float32(1.0) - share) * gain
    m, n = pairs.node_of_rank[p], pairs.node_of_rank[q]
    if m != n:
        near = pairs.node_pull[layer]
        gain += share * (near[a, n] - near[a, m] + near[b, m] - near[b, n] - both)
    return gain


@kernel
def load_cost(pairs: Pairs, layer: int, load: Number, price: Array) -> Number:
    """What the load of a rank costs; `price` is that of load above `even`, and above `cap`."""
    uneven = max(0.0, load - pairs.even[layer])
    return price[0] * uneven + price[1] * max(0.0, load - pairs.cap[layer])


@kernel
def swap_experts(pairs: Pairs, rng: Array, moves: int, temperature: float, price: Array) -> int:
    """Tries `moves` random swaps of two experts of a layer; how many were kept."""
    layers, experts = pairs.rank_of.shape
    kept = 0
    for _ in range(moves):
        layer, a, b = draw(rng, layers), draw(rng, experts), draw(rng, experts)
        p, q = pairs.rank_of[layer, a], pairs.rank_of[layer, b]
        if p == q:
            continue
        change = pairs.load[layer, b] - pairs.load[layer, a]
        old_p, old_q = pairs.rank_load[layer, p], pairs.rank_load[layer, q]
        gain = swap_gain(pairs, layer, a, b)
        gain += load_cost(pairs, layer, old_p, price) + load_cost(pairs, layer, old_q, price)
        gain -= load_cost(pairs, layer, old_p + change, price)
        gain -= load_cost(pairs, layer, old_q - change, price)
        if gain > temperature * math.log((1.0 + draw(rng, DRAWS)) / DRAWS):
            for expert, source, target in ((a, p, q), (b, q, p)):
                add_pull(pairs, layer, expert, source, np.float32(-1.0))
                add_pull(pairs, layer, expert, target, np.float32(1.0))
                pairs.rank_of[layer, expert] = target
            pairs.rank_load[layer, p] += change
            pairs.rank_load[layer, q] -= change
            kept += 1
    return kept


@kernel
def seam(pairs: Pairs, layer: int, p: int, q: int) -> Number:
    """What is gained between a layer and the one before if its experts on p and q trade places."""
    experts = pairs.rank_of.shape[1]
    gain = np.float32(0.0)
    for a in range(experts):
        here = pairs.rank_of[layer, a]
        if here in (p, q):
            for b in range(experts):
                before = pairs.rank_of[layer - 1, b]
                if before in (p, q):
                    weight = pairs.back[layer - 1, a, b]
                    gain += weight if before != here else -weight
    return gain


@kernel
def exchange_ranks(pairs: Pairs, rng: Array, moves: int, temperature: float) -> int:
    """Tries to exchange two ranks of a node over a run of layers; how many were kept.

    Only pairs across the ends of the run change, so this finds what swaps of two experts cannot:
    groups of experts that are well placed but for the layers before and after.
    """
    layers, width = pairs.rank_load.shape
    kept = 0
    for _ in range(moves):
        p, q = draw(rng, width), draw(rng, width)
        if p == q or pairs.node_of_rank[p] != pairs.node_of_rank[q]:
            continue
        first = draw(rng, layers)
        last = first + draw(rng, layers - first)
        gain = np.float32(0.0)
        if first > 0:
            gain += seam(pairs, first, p, q)
        if last + 1 < layers:
            gain += seam(pairs, last + 1, p, q)
        if gain <= temperature * math.log((1.0 + draw(rng, DRAWS)) / DRAWS):
            continue
        kept += 1
        for layer in range(first, last + 1):
            for expert in range(pairs.rank_of.shape[1]):
                here = pairs.rank_of[layer, expert]
                if here in (p, q):
                    other = p + q - here
                    add_pull(pairs, layer, expert, here, np.float32(-1.0))
                    add_pull(pairs, layer, expert, other, np.float32(1.0))
                    pairs.rank_of[layer, expert] = other
            old = pairs.rank_load[layer, p]
            pairs.rank_load[layer, p] = pairs.rank_load[layer, q]
            pairs.rank_load[layer, q] = old
    return kept
