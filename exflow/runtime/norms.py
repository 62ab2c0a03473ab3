"""Norms: RMS, and layer norm with a bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from exflow.runtime.cpu_kernels import Floats, is_little, norm_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class NormWeights:
    """A norm; with a bias it is a layer norm, without one an RMS norm.

    Attributes:
        weight: over the last dimension; an RMS norm's may have more, to broadcast.
        bias: over the last dimension, or None.
        eps: added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    @cached_property
    def array(self) -> Floats:
        """The weight, for kernels."""
        return self.weight.numpy()


def normalize(hidden: torch.Tensor, norm: NormWeights) -> torch.Tensor:
    """The norm of the last dimension."""
    width = hidden.shape[-1]
    if norm.bias is not None:
        return functional.layer_norm(hidden, (width,), norm.weight, norm.bias, norm.eps)
    if hidden.dim() == 2 and is_little(hidden, hidden.numel()):
        rows = hidden.contiguous()
        normed = torch.empty_like(rows)
        norm_rows(rows.numpy(), norm.array, norm.eps, normed.numpy())
        return normed
    return functional.rms_norm(hidden, (width,), eps=norm.eps) * norm.weight
