"""Norms: RMS, and layer norm with a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    import torch


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
    shape = norm.weight.shape
    if norm.bias is None:
        return functional.rms_norm(hidden, shape, norm.weight, norm.eps)
    return functional.layer_norm(hidden, shape, norm.weight, norm.bias, norm.eps)
