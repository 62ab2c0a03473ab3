"""Choosing the next token, greedily or at random.

A random choice depends on the logits, the seed, the request and the position only: not on the rank
or on what else is in the batch. Shape suffixes: T tokens, N of them chosen
at random, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from exflow.runtime.requests import SamplingParams

UNSOUND = -1


def sample(
    logits_TV: torch.Tensor,
    params: Sequence[SamplingParams],
    *,
    request_indices: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> torch.Tensor:
    """(T,) the next token of each row; -1 where logits are NaN or infinite.

    Args:
        logits_TV: the decoder's output.
        params: (T,) temperature, top-k, top-p and seed of each row.
        request_indices: (T,) the request of each row.
        positions: (T,) the position the new token will have.
    """
    tokens_T = likeliest(logits_TV)
    is_sound_T = logits_TV.gather(1, tokens_T[:, None])[:, 0].isfinite()
    rows = [row for row, own in enumerate(params) if own.temperature > 0]
    if not rows:
        return tokens_T.where(is_sound_T, UNSOUND)
    chosen = [params[row] for row in rows]
    uniforms = uniform(_seeds(chosen), request_indices[rows], positions[rows])
    rows_N = torch.tensor(rows, device=logits_TV.device)
    tokens_T[rows_N] = _draw(logits_TV[rows_N].float(), chosen, uniforms)
    return tokens_T.where(is_sound_T, UNSOUND)


def likeliest(logits_TV: torch.Tensor) -> torch.Tensor:
    """(T,) the greedy tokens. On a CPU NumPy finds them many times as fast as PyTorch."""
    if logits_TV.is_cuda:
        return logits_TV.argmax(dim=-1)
    return torch.from_numpy(logits_TV.float().numpy().argmax(axis=-1))


def _draw(
    logits_NV: torch.Tensor, params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> torch.Tensor:
    """(N,) tokens at random; row by row it does not matter what the other rows are."""

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_NV.device)[:, None]

    vocab_size = logits_NV.shape[-1]
    temperature_N1 = column([own.temperature for own in params], torch.float32)
    top_k_N1 = column([min(own.top_k or vocab_size, vocab_size) for own in params], torch.int64)
    top_p_N1 = column([own.top_p for own in params], torch.float32)
    top_NV, order_NV = (logits_NV / temperature_N1).sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(vocab_size, device=logits_NV.device)
    scores_NV = torch.softmax(top_NV.masked_fill(ranks_V >= top_k_N1, float("-inf")), dim=-1)
    # Top-k first, then top-p of what is left, as transformers does.
    before_NV = scores_NV.cumsum(dim=-1) - scores_NV
    cumulative = scores_NV.masked_fill(before_NV >= top_p_N1, 0.0).double().cumsum(dim=-1)
    thresholds = torch.from_numpy(uniforms).to(cumulative.device)[:, None] * cumulative[:, -1:]
    chosen = (cumulative > thresholds).int().argmax(dim=-1, keepdim=True)
    return order_NV.gather(1, chosen)[:, 0]


def _seeds(params: Sequence[SamplingParams]) -> NDArray[np.uint64]:
    return np.array([own.seed % 2**64 for own in params], dtype=np.uint64)


def uniform(
    seeds: NDArray[np.uint64],
    request_indices: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Numbers in [0, 1) from counters: SplitMix64 (Steele et al., OOPSLA 2014) of all three."""
    state = _mix(seeds)
    state = _mix(state ^ request_indices.astype(np.uint64))
    state = _mix(state ^ positions.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
