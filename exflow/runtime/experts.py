"""The experts of a rank at one layer: rows in, gate-weighted partial sums out.

Shape suffixes: N rows, K choices a row, P (row, expert) pairs, D hidden size, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from exflow.runtime.weights import ExpertWeights


def run_experts(
    experts: ExpertWeights,
    hidden_ND: torch.Tensor,
    slots_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of what the rank's experts make of each row.

    Pairs are sorted by expert and go through `grouped_mm`, which was the fastest of five ways at
    decode sizes on a CPU (against a loop over experts, padded and gathered batches).

    Args:
        experts: the rank's experts at this layer.
        hidden_ND: normed rows.
        slots_NK: the rank's slot of each choice, -1 where another rank runs it.
        weights_NK: gate weights, float32.

    Returns:
        (N, D) partial sums; zero for a row of which no expert is here.
    """
    partial_ND = torch.zeros_like(hidden_ND)
    flat_slots = slots_NK.flatten()
    slots_P, order_P = flat_slots.sort(stable=True)
    num_elsewhere = int((flat_slots < 0).sum())
    slots_P, order_P = slots_P[num_elsewhere:], order_P[num_elsewhere:]
    if len(slots_P) == 0:
        return partial_ND
    rows_P = order_P // slots_NK.shape[1]
    ends = torch.bincount(slots_P, minlength=len(experts.down)).cumsum(0).to(torch.int32)
    out_PD = apply_grouped(experts, hidden_ND.index_select(0, rows_P), ends)
    weights_P = weights_NK.flatten()[order_P].to(out_PD.dtype)
    return partial_ND.index_add_(0, rows_P, out_PD * weights_P[:, None])


def apply_grouped(
    experts: ExpertWeights, hidden_PD: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """SwiGLU of rows sorted by slot; `ends` (int32) is where each slot's rows end."""
    gate_up = functional.grouped_mm(hidden_PD, experts.gate_up, offs=ends)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.grouped_mm(functional.silu(gate) * up, experts.down, offs=ends)


def run_dense(expert: ExpertWeights, hidden_TD: torch.Tensor) -> torch.Tensor:
    """SwiGLU of a dense block, kept as one expert."""
    gate, up = (hidden_TD @ expert.gate_up[0]).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ expert.down[0]
