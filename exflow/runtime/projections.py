"""From normed rows to queries and cache entries, and back from what the queries found.

Shape suffixes: T tokens, D hidden size, H query heads, E width of a key, F elements the cache keeps
of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from exflow.models.parts import LatentAttention
from exflow.runtime.attention import rotate
from exflow.runtime.attention_weights import LatentWeights
from exflow.runtime.cpu_kernels import is_little, turn_heads
from exflow.runtime.experts import linear
from exflow.runtime.norms import normalize

if TYPE_CHECKING:
    from exflow.models.definition import DecoderDefinition
    from exflow.models.parts import FullAttention
    from exflow.runtime.attention_weights import FullWeights


def project(
    definition: DecoderDefinition,
    weights: FullWeights | LatentWeights,
    normed_TD: torch.Tensor,
    rotation_T2E: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H, E) queries, and (T, F) what the cache keeps of the tokens."""
    attention = definition.attention
    if isinstance(attention, LatentAttention):
        assert isinstance(weights, LatentWeights)
        return _project_latent(attention, weights, normed_TD, rotation_T2E)
    assert not isinstance(weights, LatentWeights)
    return _project_full(attention, weights, normed_TD, rotation_T2E)


def collect(weights: FullWeights | LatentWeights, found: torch.Tensor) -> torch.Tensor:
    """(T, width of the output projection's input) of the (T, H * E) that queries found."""
    if not isinstance(weights, LatentWeights):
        return found
    heads, rank, _ = weights.value_up.shape
    latent_HTR = found.view(len(found), heads, -1)[..., :rank].transpose(0, 1)
    return torch.bmm(latent_HTR, weights.value_up).transpose(0, 1).flatten(1)


def _project_full(
    attention: FullAttention,
    weights: FullWeights,
    normed_TD: torch.Tensor,
    rotation_T2E: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rotated = attention.num_heads + attention.num_kv_heads
    projected = linear(normed_TD, weights.qkv, weights.qkv_bias)
    projected = projected.view(len(normed_TD), -1, attention.head_dim)
    if _is_for_kernel(attention, projected) and rotation_T2E is not None:
        _turn_in_place(weights, projected, num_rotated, rotation_T2E)
        return projected[:, : attention.num_heads], projected[:, attention.num_heads :].flatten(1)
    heads = _normed_heads(attention, weights, projected[:, :num_rotated])
    values = projected[:, num_rotated:]
    if attention.clip_qkv is not None:
        heads = heads.clamp(-attention.clip_qkv, attention.clip_qkv)
        values = values.clamp(-attention.clip_qkv, attention.clip_qkv)
    heads = rotate(heads, rotation_T2E)
    entries_TF = torch.cat([heads[:, attention.num_heads :], values], dim=1).flatten(1)
    return heads[:, : attention.num_heads], entries_TF


def _is_for_kernel(attention: FullAttention, projected: torch.Tensor) -> bool:
    has_kernel = attention.qk_norm != "projection" and attention.clip_qkv is None
    return has_kernel and is_little(projected, projected.numel())


def _turn_in_place(
    weights: FullWeights, heads: torch.Tensor, num_rotated: int, rotation_T2E: torch.Tensor
) -> None:
    """Queries and keys normed and rotated by one kernel."""
    norm, eps = np.empty((0, 0), np.float32), 0.0
    if weights.qk_norms:
        norm, eps = weights.qk_norms[0].array, weights.qk_norms[0].eps
    turn_heads(heads.numpy(), num_rotated, norm, eps, rotation_T2E.numpy())


def _normed_heads(
    attention: FullAttention, weights: FullWeights, heads: torch.Tensor
) -> torch.Tensor:
    """Queries and keys after their norms: over each head, or each over its whole width."""
    if attention.qk_norm == "none":
        return heads
    if attention.qk_norm == "head":
        return normalize(heads, weights.qk_norms[0])
    sections = torch.split(heads, [attention.num_heads, attention.num_kv_heads], dim=1)
    parts = [
        normalize(part.flatten(1), norm).view_as(part)
        for part, norm in zip(sections, weights.qk_norms, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _project_latent(
    attention: LatentAttention,
    weights: LatentWeights,
    normed_TD: torch.Tensor,
    rotation_T2E: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries in the latent space beside their rotated part; entries alike."""
    num_tokens = len(normed_TD)
    rows = normed_TD
    if weights.query_down is not None and weights.query_norm is not None:
        rows = normalize(
            linear(rows, weights.query_down, weights.query_down_bias), weights.query_norm
        )
    query = (rows @ weights.query).view(num_tokens, attention.num_heads, -1)
    latent_HTR = torch.bmm(query[..., : attention.nope_dim].transpose(0, 1), weights.key_up)
    entry = linear(normed_TD, weights.entry, weights.entry_bias)
    rotated = rotate(
        torch.cat(
            [query[..., attention.nope_dim :], entry[:, None, attention.latent_rank :]], dim=1
        ),
        rotation_T2E,
    )
    query_THE = torch.cat([latent_HTR.transpose(0, 1), rotated[:, :-1]], dim=-1)
    latent_TR = normalize(entry[:, : attention.latent_rank], weights.entry_norm)
    return query_THE, torch.cat([latent_TR, rotated[:, -1]], dim=-1)
