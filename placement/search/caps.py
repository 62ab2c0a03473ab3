"""Load caps that hold on tokens not seen.

A plan that fits the load of its own tokens exactly is less even on others. How much less is told
by the tokens' sequences: drawn again with replacement, half as many, their load differs from the
fitted load about as much as the load of other sequences does (the variance of the difference of
two samples is twice that of one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.traffic import imbalance_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.search.state import Flow

DRAWS = 64


def sequence_load(flow: Flow, sequence: NDArray[np.int64]) -> NDArray[np.float64]:
    """(sequences, L, W) token load by sequence; `sequence` (T,) counts from 0."""
    layers, _, _top_k = flow.choice.shape
    width, count = flow.load.shape[1], int(sequence.max()) + 1
    load = np.empty((count, layers, width))
    for layer in range(layers):
        cell = sequence[:, None] * width + flow.choice[layer]
        load[:, layer] = np.bincount(cell.ravel(), minlength=count * width).reshape(count, width)
    return load


def expected_imbalance(
    flow: Flow, sequence: NDArray[np.int64], *, seed: int
) -> NDArray[np.float64]:
    """(DRAWS,) imbalance, mean over layers, to expect on as many tokens of other sequences."""
    load = sequence_load(flow, sequence)
    count = len(load)
    if count < 2:
        return np.array([imbalance_of(flow.load).mean()])
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(max(1, count // 2), np.full(count, 1 / count), size=DRAWS)
    drawn = np.tensordot(draws.astype(np.float64), load, axes=1)
    return np.array([imbalance_of(layers).mean() for layers in drawn])
