"""Choosing the next token, greedily or at random.

A random choice depends on the logits, the seed, the request and the position only: not on the rank
or on what else is in the batch. Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exflow.runtime.requests import SamplingParams


def sample(
    logits_TV: torch.Tensor,
    params: SamplingParams,
    *,
    request_indices: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> torch.Tensor:
    """(T,) the next token of each row.

    Args:
        logits_TV: the decoder's output.
        params: temperature, top-k, top-p and seed.
        request_indices: (T,) the request of each row.
        positions: (T,) the position the new token will have.
    """
    if params.temperature == 0:
        return logits_TV.argmax(dim=-1)
    uniforms = uniform(params.seed, request_indices, positions)
    scores_TV, order_TV = _kept(logits_TV.float() / params.temperature, params)
    cumulative = scores_TV.double().cumsum(dim=-1)
    thresholds = torch.from_numpy(uniforms).to(cumulative.device)[:, None] * cumulative[:, -1:]
    chosen = (cumulative > thresholds).int().argmax(dim=-1, keepdim=True)
    return order_TV.gather(1, chosen)[:, 0]


def _kept(logits_TV: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities by falling value, zero where cut off, and their tokens.

    Top-k first, then top-p of what is left, as `transformers` does.
    """
    vocab_size = logits_TV.shape[-1]
    count = min(params.top_k, vocab_size) if params.top_k else vocab_size
    top_TV, order_TV = logits_TV.sort(dim=-1, descending=True, stable=True)
    scores_TV = torch.softmax(top_TV[:, :count], dim=-1)
    before_TV = scores_TV.cumsum(dim=-1) - scores_TV
    return scores_TV.masked_fill(before_TV >= params.top_p, 0.0), order_TV


def uniform(
    seed: int, request_indices: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Numbers in [0, 1) from counters: SplitMix64 (Steele et al., OOPSLA 2014) of all three."""
    state = _mix(np.full(len(request_indices), seed % 2**64, dtype=np.uint64))
    state = _mix(state ^ request_indices.astype(np.uint64))
    state = _mix(state ^ positions.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
