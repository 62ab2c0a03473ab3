"""Queries, keys and masks: attention as such, wherever keys and values come from.

Shape suffixes: T tokens, C tokens of context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from exflow.models.parts import LatentAttention

if TYPE_CHECKING:
    from exflow.models.parts import FullAttention


def keys_and_values(
    entries: torch.Tensor, attention: FullAttention | LatentAttention
) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., C, J, E) keys and values in entries (..., C, F); a latent entry is both at once."""
    if isinstance(attention, LatentAttention):
        heads = entries[..., None, :]
        return heads, heads
    heads = entries.view(*entries.shape[:-1], 2, attention.num_kv_heads, attention.head_dim)
    return heads[..., 0, :, :], heads[..., 1, :, :]


def seen(positions_T: torch.Tensor, context_C: torch.Tensor, window: int | None) -> torch.Tensor:
    """Bool (T, C): a token sees itself and what is before, inside its window."""
    is_seen = context_C <= positions_T[:, None]
    return is_seen if window is None else is_seen & (context_C > positions_T[:, None] - window)


def added(is_seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zero where a token sees, minus infinity elsewhere."""
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill_(~is_seen, float("-inf"))


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention; causal without a mask.

    Args:
        query: (..., T, E).
        keys: (..., C, E).
        values: (..., C, E).
        mask: added to the logits (..., T, C); None for a whole prompt.
        scale: factor on the logits before that.
        sinks: (..., T or 1, 1) logits of attending to nothing; with them there must be a mask.
    """
    if sinks is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    assert mask is not None
    logits = (query @ keys.transpose(-1, -2)) * scale + mask
    logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
    shares = torch.softmax(logits, dim=-1, dtype=torch.float32).to(values.dtype)
    return shares[..., :-1] @ values
