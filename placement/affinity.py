"""AffinityGraph: how often experts follow one another, and how often they are used together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import networkx as nx
    from numpy.typing import NDArray

    from placement.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, eq=False)
class AffinityGraph:
    """Pair counts of a routing trace.

    The affinity of the ExFlow paper (arXiv 2401.08383) is `probabilities()`: P(expert j at the next
    MoE layer | expert i at this one).

    With top-k routing every pair of a token's experts counts once: k * k transitions a token and
    layer, k * (k - 1) / 2 co-activations.

    >>> from placement.trace import RoutingTrace
    >>> trace = RoutingTrace(          # three tokens, two layers, top-1 of two experts
    ...     expert_ids=np.array([[[0], [1]], [[0], [1]], [[1], [1]]], dtype=np.int16),
    ...     sequence_ids=np.zeros(3, dtype=np.int32), num_experts=2, model="toy", layer_ids=(0, 1))
    >>> AffinityGraph.from_trace(trace).transitions.tolist()
    [[[0, 2], [0, 1]]]

    Attributes:
        load: int64 (layers, experts), tokens that use an expert.
        transitions: int64 (layers - 1, experts, experts), tokens that use expert i at a layer and
            expert j at the next.
        coactivation: int64 (layers, experts, experts), tokens that use both i and j at a layer;
            the diagonal is 0.
        layer_ids: The model's own index of each MoE layer.
        num_tokens: Tokens counted.
    """

    load: NDArray[np.int64]
    transitions: NDArray[np.int64]
    coactivation: NDArray[np.int64]
    layer_ids: tuple[int, ...]
    num_tokens: int

    @classmethod
    def from_trace(cls, trace: RoutingTrace) -> AffinityGraph:
        """Counts a trace."""
        experts = trace.num_experts
        ids = np.ascontiguousarray(trace.expert_ids.transpose(1, 2, 0))
        coactivation = np.stack([count_pairs(layer, layer, experts) for layer in ids])
        load = coactivation.diagonal(axis1=1, axis2=2).copy()
        coactivation[:, np.arange(experts), np.arange(experts)] = 0
        return cls(
            load=load,
            transitions=count_transitions(trace),
            coactivation=coactivation,
            layer_ids=trace.layer_ids,
            num_tokens=trace.num_tokens,
        )

    def probabilities(self) -> NDArray[np.float64]:
        """(layers - 1, experts, experts) P(j next | i now); the row of an unused expert is 0."""
        rows = self.transitions.sum(axis=2, keepdims=True)
        probabilities: NDArray[np.float64] = self.transitions / np.maximum(rows, 1)
        return probabilities

    def to_networkx(self) -> nx.DiGraph[Any]:
        """The inter-layer graph.

        Nodes are (layer id, expert) with `load`; edges run to the next MoE layer with `weight`
        (tokens) and `probability`. Pairs that never occur have no edge.
        """
        import networkx as nx

        graph: nx.DiGraph[Any] = nx.DiGraph(num_tokens=self.num_tokens)
        for layer, loads in zip(self.layer_ids, self.load.tolist(), strict=True):
            graph.add_nodes_from(((layer, e), {"load": load}) for e, load in enumerate(loads))
        probabilities = self.probabilities()
        for step, i, j in np.argwhere(self.transitions).tolist():
            graph.add_edge(
                (self.layer_ids[step], i),
                (self.layer_ids[step + 1], j),
                weight=int(self.transitions[step, i, j]),
                probability=float(probabilities[step, i, j]),
            )
        return graph


def count_transitions(trace: RoutingTrace) -> NDArray[np.int64]:
    """(layers - 1, experts, experts) tokens by expert at a layer and expert at the next."""
    experts = trace.num_experts
    ids = np.ascontiguousarray(trace.expert_ids.transpose(1, 2, 0))
    counts = [count_pairs(a, b, experts) for a, b in pairwise(ids)]
    return np.array(counts, dtype=np.int64).reshape(-1, experts, experts)


def count_pairs(
    ids_KT: NDArray[np.int16], next_ids_KT: NDArray[np.int16], num_experts: int
) -> NDArray[np.int64]:
    """(experts, experts) tokens that use expert i of the first and j of the second."""
    counts = np.zeros(num_experts * num_experts, dtype=np.int64)
    rows_KT = ids_KT.astype(np.intp) * num_experts
    for row_T in rows_KT:
        counts += np.bincount((row_T + next_ids_KT).ravel(), minlength=len(counts))
    return counts.reshape(num_experts, num_experts)
