"""Decoder: the arithmetic that tokens get on the rank that owns them.

Shape suffixes: T tokens, D hidden size, H query heads, J key-value heads, E head size, K experts a
token, F elements of a key and value, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from exflow.runtime.attention import rotate
from exflow.runtime.experts import run_dense

if TYPE_CHECKING:
    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.attention import Attention
    from exflow.runtime.weights import DecoderWeights, LayerWeights


class Decoder:
    """A definition with its weights."""

    def __init__(self, definition: DecoderDefinition, weights: DecoderWeights) -> None:
        self.definition = definition
        self.weights = weights
        self._rotated_heads = definition.num_heads + definition.num_kv_heads

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """(T, D) the residual stream's beginning."""
        return functional.embedding(token_ids_T, self.weights.embedding)

    def attend(
        self, layer: int, hidden_TD: torch.Tensor, slots_T: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """The residual stream after a layer's attention."""
        num_tokens = hidden_TD.shape[0]
        if num_tokens == 0:
            return hidden_TD
        weights, definition = self.weights.layers[layer], self.definition
        normed_TD = self._norm(hidden_TD, weights.input_norm)
        projected = _linear(normed_TD, weights.qkv, weights.qkv_bias)
        projected = projected.view(num_tokens, -1, definition.head_dim)
        heads = self._normed_heads(projected[:, : self._rotated_heads], weights)
        values = projected[:, self._rotated_heads :]
        if definition.clip_qkv is not None:
            heads = heads.clamp(-definition.clip_qkv, definition.clip_qkv)
            values = values.clamp(-definition.clip_qkv, definition.clip_qkv)
        heads = rotate(heads, attention.rotation(slots_T))
        entries_TF = torch.cat([heads[:, definition.num_heads :], values], dim=1).flatten(1)
        query_THE = heads[:, : definition.num_heads]
        found = attention.attend(layer, slots_T, query_THE, entries_TF)
        if weights.output_bias is not None:
            found_TD = torch.addmm(weights.output_bias, found, weights.output)
            return hidden_TD + found_TD
        return torch.addmm(hidden_TD, found, weights.output)

    def route(self, layer: int, normed_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, K) experts of each normed token, by falling gate weight; the weights in float32."""
        definition, router = self.definition, self.weights.layers[layer].router
        assert router is not None
        logits = normed_TD @ router
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        weights_TK, expert_ids_TK = scores.topk(definition.top_k, dim=-1)
        if definition.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return expert_ids_TK, weights_TK.to(normed_TD.dtype).float()

    def post_norm(self, layer: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The norm between a layer's attention and its experts."""
        return self._norm(hidden_TD, self.weights.layers[layer].post_norm)

    def dense(self, layer: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The residual stream after a dense block."""
        dense = self.weights.layers[layer].dense
        assert dense is not None
        return hidden_TD + run_dense(dense, self.post_norm(layer, hidden_TD))

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """(T, V)."""
        return self._norm(hidden_TD, self.weights.final_norm) @ self.weights.head

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self.definition.norm_eps)

    def _normed_heads(self, heads: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        """Queries and keys after their norms: over each head, or each over its whole width."""
        if weights.qk_norm is None:
            return heads
        definition = self.definition
        if definition.qk_norm == "head":
            normed = functional.rms_norm(heads, heads.shape[-1:], eps=definition.norm_eps)
            return normed * weights.qk_norm
        sections = torch.split(heads, [definition.num_heads, definition.num_kv_heads], dim=1)
        parts = [
            functional.rms_norm(part, part.shape[1:], eps=definition.norm_eps) for part in sections
        ]
        return torch.cat(parts, dim=1) * weights.qk_norm


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
