"""Recordings that hold loads only: how often each expert was used, not which token used which.

Loads suffice for a plan that balances. They cannot show affinity, which needs the experts of one
token side by side. Such a recording becomes a trace of phase "counts": tokens drawn so that the
loads are right, independently in each layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.interop.errors import RecordError
from placement.trace import COUNTS, RoutingTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.interop.model_shape import ModelShape

MAX_TOKENS = 1 << 14
LOAD_STRATEGIES = frozenset({"linear", "round_robin", "random", "balanced"})


def trace_of_counts(
    counts: NDArray[np.float64], shape: ModelShape, *, source: str, seed: int = 0
) -> RoutingTrace:
    """A trace with the given loads and no other structure.

    Args:
        counts: (MoE layers or decoder layers, experts), how often each was used.
        shape: the model.
        source: written into the trace.
        seed: of the order of tokens in each layer.

    Raises:
        RecordError: if the counts do not fit the model or a layer has none.
    """
    counts, layer_ids = _moe_layers(counts, shape)
    top_k = shape.top_k or 1
    if (
        not counts.size
        or not np.isfinite(counts).all()
        or counts.min() < 0
        or not counts.sum(axis=1).all()
    ):
        msg = "loads must be zero or more, and a layer cannot be without any"
        raise RecordError(msg)
    tokens = int(min(MAX_TOKENS, max(counts.sum(axis=1).max() // top_k, 2)))
    rng = np.random.default_rng(seed)
    layers = [_draw(row, tokens, top_k, rng) for row in counts]
    return RoutingTrace(
        expert_ids=np.stack(layers, axis=1),
        sequence_ids=np.arange(tokens, dtype=np.int32),
        num_experts=counts.shape[1],
        model=shape.model or "unknown",
        layer_ids=layer_ids,
        phase=COUNTS,
        source=f"{source} (loads only)",
    )


def _moe_layers(
    counts: NDArray[np.float64], shape: ModelShape
) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    layers, experts = counts.shape
    if shape.num_experts is not None and shape.num_experts != experts:
        msg = f"the loads are of {experts} experts, the model has {shape.num_experts}"
        raise RecordError(msg)
    known = shape.moe_layers
    if known is None:
        if shape.num_layers not in {None, layers}:
            msg = f"the loads are of {layers} layers, the model has {shape.num_layers}; "
            raise RecordError(msg + "give --moe-layers")
        used = tuple(int(layer) for layer in np.flatnonzero(counts.sum(axis=1)))
        return counts[list(used)], used
    if layers == len(known):
        return counts, known
    if layers != shape.num_layers:
        msg = f"the loads are of {layers} layers, the model has {len(known)} MoE layers"
        raise RecordError(msg)
    return counts[list(known)], known


def _draw(
    counts: NDArray[np.float64], tokens: int, top_k: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """(tokens, top_k) experts in proportion to counts, none twice for a token.

    An expert's pairs are consecutive and dealt to the tokens in turn, so a token gets an expert
    twice only if it has more pairs than there are tokens; such an expert is capped.
    """
    share = np.minimum(counts / counts.sum() * tokens * top_k, tokens)
    pairs = np.floor(share).astype(np.int64)
    missing = tokens * top_k - int(pairs.sum())
    order = np.argsort(pairs - share, kind="stable")
    while missing > 0:
        room = order[(pairs[order] < tokens) & (counts[order] > 0)][:missing]
        if not len(room):
            msg = f"{top_k} experts a token cannot be drawn from {np.count_nonzero(counts)} in use"
            raise RecordError(msg)
        pairs[room] += 1
        missing -= len(room)
    dealt = np.repeat(np.arange(len(pairs), dtype=np.int16), pairs).reshape(top_k, tokens).T
    return rng.permutation(dealt)
