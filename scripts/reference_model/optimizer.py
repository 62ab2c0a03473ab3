"""Muon for the weight matrices and AdamW for the rest, on plain tensors, with state that is easy to save.

Muon (K. Jordan et al., 2024): the momentum of a matrix is replaced by the nearest semi-orthogonal
matrix, found with five Newton-Schulz iterations; the update is scaled to the root mean square of an
AdamW update as in Moonlight (arXiv 2502.16982, section 2.2). Matrices of one shape (all experts of all
layers, say) are orthogonalised together.
"""

from __future__ import annotations

import torch
from torch import Tensor

MUON_NAMES = ("qkv", "out", "gate_up", "down")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly (singular values end between 0.7 and 1.2)."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        mixed = torch.bmm(gram, gram).mul_(c).add_(gram, alpha=b)
        x = torch.bmm(mixed, x).add_(x, alpha=a)
    return x.mT if tall else x


class Optimizer:
    """Holds the moments of every parameter; `state` is a flat dict of tensors."""

    def __init__(self, params: dict[str, Tensor], head_width: int) -> None:
        self.params = params
        self.head_width = head_width
        self.muon = [name for name in params if name.endswith(MUON_NAMES)]
        self.adam = [name for name in params if name not in self.muon]
        self.state = {f"momentum.{name}": torch.zeros_like(params[name]) for name in self.muon}
        for name in self.adam:
            self.state[f"first.{name}"] = torch.zeros_like(params[name])
            self.state[f"second.{name}"] = torch.zeros_like(params[name])

    def matrices(self, name: str, value: Tensor) -> Tensor:
        """View of a parameter as (count, rows, columns): heads, gates and experts stand alone."""
        if name.endswith("qkv"):
            return value.view(-1, self.head_width, value.shape[-1])
        if name.endswith("gate_up"):
            return value.view(-1, value.shape[1] // 2, value.shape[2])
        return value.view(-1, *value.shape[-2:])

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], *, lr: float, step: int, decay: float = 0.1) -> None:
        """Update the parameters in place; `step` counts from 1."""
        self._muon_step(grads, lr, decay)
        self._adam_step(grads, lr, step, decay)

    def _muon_step(self, grads: dict[str, Tensor], lr: float, decay: float) -> None:
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in self.muon:
            groups.setdefault(self.matrices(name, self.params[name]).shape[1:], []).append(name)
        for shape, names in groups.items():
            momenta = [self.state[f"momentum.{name}"] for name in names]
            grad = [grads[name] for name in names]
            torch._foreach_lerp_(momenta, grad, 0.05)
            nesterov = torch._foreach_lerp(grad, momenta, 0.95)
            update = orthogonalise(
                torch.cat([self.matrices(n, g) for n, g in zip(names, nesterov, strict=True)])
            )
            weights = [self.params[name] for name in names]
            torch._foreach_mul_(weights, 1 - lr * decay)
            parts = update.split(
                [self.matrices(n, w).shape[0] for n, w in zip(names, weights, strict=True)]
            )
            for name, weight, part in zip(names, weights, parts, strict=True):
                self.matrices(name, weight).add_(part, alpha=-lr * 0.2 * max(shape) ** 0.5)

    def _adam_step(self, grads: dict[str, Tensor], lr: float, step: int, decay: float) -> None:
        for name in self.adam:
            first, second = self.state[f"first.{name}"], self.state[f"second.{name}"]
            grad = grads[name]
            first.lerp_(grad, 0.1)
            second.lerp_(grad.square(), 0.05)
            denominator = (second / (1 - 0.95**step)).sqrt_().add_(1e-10)
            if name == "embed":
                self.params[name].mul_(1 - lr * decay)
            self.params[name].addcdiv_(first, denominator, value=-lr / (1 - 0.9**step))
