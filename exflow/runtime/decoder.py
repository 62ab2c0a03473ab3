"""Decoder: the arithmetic that tokens get on the rank that owns them.

Shape suffixes: T tokens, D hidden size, K experts a token, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from exflow.runtime.experts import run_dense
from exflow.runtime.norms import normalize
from exflow.runtime.projections import collect, project
from exflow.runtime.router import route

if TYPE_CHECKING:
    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.attention import Attention
    from exflow.runtime.weights import DecoderWeights


class Decoder:
    """A definition with its weights."""

    def __init__(self, definition: DecoderDefinition, weights: DecoderWeights) -> None:
        self.definition = definition
        self.weights = weights

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """(T, D) the residual stream's beginning; learned positions are added by `attend`."""
        return functional.embedding(token_ids_T, self.weights.embedding)

    def attend(
        self, layer: int, hidden_TD: torch.Tensor, slots_T: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """The residual stream after a layer's attention."""
        if hidden_TD.shape[0] == 0:
            return hidden_TD
        if layer == 0 and self.weights.positions is not None:
            positions_T = attention.positions(slots_T)
            hidden_TD = hidden_TD + functional.embedding(positions_T, self.weights.positions)
        layer_weights = self.weights.layers[layer]
        weights = layer_weights.attention
        normed_TD = normalize(hidden_TD, layer_weights.input_norm)
        query_THE, entries_TF = project(
            self.definition, weights, normed_TD, attention.rotation(slots_T)
        )
        found = attention.attend(layer, slots_T, query_THE, entries_TF, sinks_H=weights.sinks)
        found = collect(weights, found)
        if weights.output_bias is not None:
            return hidden_TD + torch.addmm(weights.output_bias, found, weights.output)
        return torch.addmm(hidden_TD, found, weights.output)

    def route(self, layer: int, normed_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, K) experts of each normed token, by falling gate weight; the weights in float32."""
        weights = self.weights.layers[layer].router
        assert weights is not None
        return route(self.definition.router, weights, normed_TD, self.definition.top_k)

    def post_norm(self, layer: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The norm between a layer's attention and its experts."""
        return normalize(hidden_TD, self.weights.layers[layer].post_norm)

    def dense(self, layer: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The residual stream after a dense block."""
        dense = self.weights.layers[layer].dense
        assert dense is not None
        return hidden_TD + run_dense(dense, self.post_norm(layer, hidden_TD))

    @property
    def has_shared(self) -> bool:
        """Whether MoE layers have a shared expert."""
        return self.definition.shared_expert is not None

    def shared(self, layer: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        """What the shared expert of a MoE layer adds to the residual stream."""
        weights = self.weights.layers[layer]
        assert weights.shared is not None
        normed_TD = self.post_norm(layer, hidden_TD)
        out_TD = run_dense(weights.shared, normed_TD)
        if weights.shared_gate is None:
            return out_TD
        return torch.sigmoid(normed_TD @ weights.shared_gate) * out_TD

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """(T, V)."""
        return normalize(hidden_TD, self.weights.final_norm) @ self.weights.head
