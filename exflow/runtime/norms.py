"""Norms: RMS, and layer norm with a bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, eq=False)
class NormWeights:
    """A norm; with a bias it is a layer norm, without one an RMS norm.

    Attributes:
        weight: over the last dimension.
        bias: over the last dimension, or None.
        eps: added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


def normalize(hidden: torch.Tensor, norm: NormWeights) -> torch.Tensor:
    """The norm of the last dimension."""
    if norm.bias is not None:
        return functional.layer_norm(hidden, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return rms_norm(hidden, norm.eps) * norm.weight


def rms_norm(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows of the last dimension over the root of their mean square.

    PyTorch's is eight kernels on a CPU but one on a GPU. A row beside its negative has mean 0 and
    the same mean square, so that layer norm, one kernel on a CPU, does it.
    """
    width = hidden.shape[-1]
    if hidden.is_cuda:
        return functional.rms_norm(hidden, (width,), eps=eps)
    both = torch.cat((hidden, -hidden), dim=-1)
    return functional.layer_norm(both, (2 * width,), eps=eps)[..., :width]
