"""Norms: RMS, and layer norm with a bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional


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
    def weight_by_root(self) -> torch.Tensor:
        """The weight times the square root of the width."""
        return self.weight * math.sqrt(self.weight.shape[-1])

    @cached_property
    def root_eps(self) -> torch.Tensor:
        """() the square root of epsilon times the width."""
        return self.weight.new_tensor(math.sqrt(self.eps * self.weight.shape[-1]))


def normalize(hidden: torch.Tensor, norm: NormWeights) -> torch.Tensor:
    """The norm of the last dimension.

    PyTorch's RMS norm is one kernel on a GPU, but eight on a CPU. Four do it there: the root of the
    mean square and epsilon is hypot(|x|, sqrt(eps * width)) / sqrt(width).
    """
    width = hidden.shape[-1]
    if norm.bias is not None:
        return functional.layer_norm(hidden, (width,), norm.weight, norm.bias, norm.eps)
    if hidden.is_cuda or hidden.dtype != torch.float32:
        return functional.rms_norm(hidden, (width,), eps=norm.eps) * norm.weight
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden.mul(length.hypot_(norm.root_eps).reciprocal_()).mul_(norm.weight_by_root)
