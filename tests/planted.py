"""Routing traces with planted structure, for the planner's tests."""

from dataclasses import replace

import numpy as np

from placement.trace import RoutingTrace


def planted_trace(
    *, tokens=600, layers=4, experts=8, top_k=2, topics=4, noise=0.1, sequences=12, seed=0
):
    """Tokens of a topic use the experts of one hidden group at every layer, but for some noise."""
    rng = np.random.default_rng(seed)
    sequence = np.sort(rng.integers(0, sequences, tokens))
    topic = rng.integers(0, topics, tokens)
    groups = [rng.permutation(experts).reshape(topics, -1) for _ in range(layers)]
    score = rng.random((tokens, layers, experts))
    for layer, group in enumerate(groups):
        score[np.arange(tokens)[:, None], layer, group[topic]] += rng.random((tokens, 1)) > noise
    return RoutingTrace(
        expert_ids=np.argsort(-score, axis=2)[:, :, :top_k].astype(np.int16),
        sequence_ids=sequence.astype(np.int32),
        num_experts=experts,
        model="planted",
        layer_ids=tuple(range(layers)),
    )


def foretelling(trace, *, right=0.7, seed=0):
    """The trace with experts foretold for its tokens, rightly for so many; those of others else."""
    rng = np.random.default_rng(seed)
    first = trace.expert_ids[:, 0]
    is_right = rng.random((trace.num_tokens, 1)) < right
    return replace(trace, foretold_ids=np.where(is_right, first, rng.permutation(first)))


def random_trace(*, tokens=40, layers=3, experts=4, top_k=1, seed=0):
    """Tokens without structure."""
    rng = np.random.default_rng(seed)
    score = rng.random((tokens, layers, experts))
    return RoutingTrace(
        expert_ids=np.argsort(score, axis=2)[:, :, :top_k].astype(np.int16),
        sequence_ids=rng.integers(0, 6, tokens).astype(np.int32),
        num_experts=experts,
        model="random",
        layer_ids=tuple(range(layers)),
    )
