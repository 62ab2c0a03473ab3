"""The outlook of a plan: which rank should own a token next, by what its experts foretell.

Every rank that runs some of a token's experts may own it next at the same price. What the next
layer then costs is foretold by the experts the token uses now: per layer and rank a linear
regression of that cost on the experts, fitted on the trace. An owner that knew the next layer's
experts would save 2 to 4% of the rows; this finds half to two thirds of it.

Shapes: L layers, E experts, W ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.search.jit import Array, kernel
from placement.search.walk import visit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.search.state import Layout, Machine, Tokens

RIDGE = 5.0
STEPS_PER_ROW = 32


def fit_outlook(
    tokens: Tokens, machine: Machine, layout: Layout, *, visits: float
) -> NDArray[np.int32]:
    """(L, E, W) whole numbers from 0; the last layer's are 0.

    Args:
        tokens: in random order; where they are many, the first ones are enough.
        machine: ranks and prices.
        layout: where experts are.
        visits: of a token to a layer on a rank, to look at in all.
    """
    layers, count, top_k = tokens.expert_ids.shape
    experts, width = layout.hosts.shape[1], len(machine.node_of_rank)
    sample = min(count, max(2000, int(visits / (layers * width))))
    outlook = np.zeros((layers, experts, width), dtype=np.int32)
    choice = np.zeros(top_k, dtype=np.int64)
    for layer in range(layers - 1):
        pairs = np.zeros((experts, experts))
        saved = np.zeros((experts, width))
        count_ahead(tokens, machine, layout, layer, sample, pairs, saved, choice)
        pairs[np.diag_indices(experts)] += RIDGE
        worth = np.linalg.solve(pairs, saved)
        worth -= worth.min(axis=1, keepdims=True)
        outlook[layer] = np.round(worth * STEPS_PER_ROW)
    return outlook


@kernel
def count_ahead(
    tokens: Tokens,
    machine: Machine,
    layout: Layout,
    layer: int,
    sample: int,
    pairs: Array,
    saved: Array,
    choice: Array,
) -> None:
    """Adds up the normal equations of the regression: pairs of experts, and the cost saved."""
    ids, top_k = tokens.expert_ids, tokens.expert_ids.shape[2]
    width = len(machine.node_of_rank)
    for token in range(sample):
        weight = tokens.weight[token]
        for rank in range(width):
            _, cost = visit(layer + 1, token, rank, ids, layout.hosts, machine, choice)
            for k in range(top_k):
                saved[ids[layer, token, k], rank] -= weight * cost
        for k in range(top_k):
            for j in range(top_k):
                pairs[ids[layer, token, k], ids[layer, token, j]] += weight
