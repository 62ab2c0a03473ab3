"""Load caps that hold on tokens not seen.

A plan that fits the load of its own tokens exactly is less even on others. How much less is told
by the tokens' sequences: drawn again with replacement, half as many, their load differs from the
fitted load about as much as the load of other sequences does (the variance of the difference of
two samples is twice that of one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.traffic import imbalance_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.search.state import Flow

DRAWS = 64
HEADROOM, LEAST_HEADROOM = 0.75, 0.25
NODE_HEADROOM, RANK_HEADROOM = 0.62, 0.9
NOISE_SHARE = 0.4


class Caps(NamedTuple):
    """Max / mean load that a search keeps to.

    Attributes:
        rank: of ranks, at every layer.
        node: of nodes, at every layer.
        mean: of ranks, mean over layers; layers share it as serves the rows best.
    """

    rank: float
    node: float
    mean: float

    @property
    def even(self) -> float:
        """Load over mean load from which on load has a price."""
        return 1 + (self.mean - 1) / 2

    def within(self) -> Caps:
        """What to keep to on the tokens at hand so that nodes and the mean keep it on others."""
        shares = (RANK_HEADROOM, NODE_HEADROOM, HEADROOM)
        return Caps(*(1 + (cap - 1) * share for cap, share in zip(self, shares, strict=True)))


def steered(price: float, load: NDArray[np.float64], mean: float, haste: float) -> float:
    """The price of uneven load that brings the imbalance nearer to its wanted mean over layers.

    Args:
        price: what uneven load cost until now.
        load: (L, W) what came of it.
        mean: wanted imbalance, mean over layers; infinity: load costs nothing.
        haste: power of the ratio of found to wanted imbalance.
    """
    if not np.isfinite(mean):
        return 0.0
    found = float(imbalance_of(load).mean()) - 1
    ratio: float = (found / max(mean - 1, 1e-3)) ** haste
    return price * min(2.0, max(0.5, ratio))


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
