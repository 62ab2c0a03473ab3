"""The experts of a rank at one layer: rows in, gate-weighted partial sums out.

Shape suffixes: N rows, K choices a row, P (row, expert) pairs, S slots, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from exflow.runtime.cpu_kernels import is_little, run_silu_experts

if TYPE_CHECKING:
    from exflow.models.parts import Activation
    from exflow.runtime.expert_weights import ExpertWeights


# Sizes (of one expert, and times the rows) up to which all experts on all rows take less time than
# sorting rows by expert and many small products; found on a CPU with AVX-512.
SMALL_EXPERT = 1 << 13
FEW_ROWS = 1 << 17
# Choices of all rows, for each expert here, up to which a GPU reads weights for each choice alone; on
# one H100 both ways meet at 1.0 to 2.0 for Qwen3-30B, DeepSeek-V2-Lite and Mixtral-8x7B.
PAIRS_A_SLOT = 1.0


def run_experts(
    experts: ExpertWeights,
    hidden_ND: torch.Tensor,
    slots_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of what the rank's experts make of each row.

    Args:
        experts: the rank's experts at this layer.
        hidden_ND: normed rows.
        slots_NK: the rank's slot of each choice, -1 where another rank runs it.
        weights_NK: gate weights, float32.

    Returns:
        (N, D) partial sums; zero for a row of which no expert is here.
    """
    num_slots, width, hidden_size = experts.down.shape
    num_rows = hidden_ND.shape[0]
    if num_slots == 0 or num_rows == 0:
        return torch.zeros_like(hidden_ND)
    if _is_for_kernel(experts, hidden_ND, slots_NK.shape[1]):
        return run_little(experts, hidden_ND, slots_NK, weights_NK)
    if hidden_ND.is_cuda and has_kernel(experts) and slots_NK.numel() <= num_slots * PAIRS_A_SLOT:
        from exflow.runtime.gpu_kernels import run_pairs

        return run_pairs(experts, hidden_ND, slots_NK, weights_NK)
    if experts.joined is not None and num_rows * width * hidden_size <= FEW_ROWS:
        return run_all(experts, experts.joined, hidden_ND, slots_NK, weights_NK)
    return run_chosen(experts, hidden_ND, slots_NK, weights_NK)


def has_kernel(experts: ExpertWeights) -> bool:
    """Whether there are kernels of our own for such experts."""
    return experts.activation.kind == "silu" and not experts.activation.has_bias


def _is_for_kernel(experts: ExpertWeights, hidden_ND: torch.Tensor, top_k: int) -> bool:
    _, size, width = experts.down.shape
    return has_kernel(experts) and is_little(
        hidden_ND, 3 * hidden_ND.shape[0] * top_k * size * width
    )


def run_little(
    experts: ExpertWeights,
    hidden_ND: torch.Tensor,
    slots_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Every pair of row and expert by one kernel."""
    partial_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
    run_silu_experts(
        hidden_ND.contiguous().numpy(),
        *experts.arrays,
        slots_NK.contiguous().numpy(),
        weights_NK.contiguous().numpy(),
        partial_ND.numpy(),
    )
    return partial_ND


def can_join(width: int, hidden_size: int, dtype: torch.dtype) -> bool:
    """Whether experts are small enough for `run_all`.

    Not in float16, where an expert that was not chosen might overflow and spoil the sum.
    """
    return width * hidden_size <= SMALL_EXPERT and dtype != torch.float16


def run_all(
    experts: ExpertWeights,
    joined: torch.Tensor,
    hidden_ND: torch.Tensor,
    slots_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Every expert on every row, in two products; the gate is zero where it did not choose."""
    num_slots, width, _ = experts.down.shape
    num_rows = hidden_ND.shape[0]
    gate_NS = weights_NK.new_zeros((num_rows, num_slots + 1))
    gate_NS.scatter_(1, slots_NK % (num_slots + 1), weights_NK)  # -1 becomes the last column
    inner = activate(linear(hidden_ND, joined, experts.joined_bias), experts.activation)
    inner.view(num_rows, num_slots, width).mul_(gate_NS[:, :-1, None])
    out_ND = inner @ experts.down.view(num_slots * width, -1)
    if experts.down_bias is None:
        return out_ND
    return torch.addmm(out_ND, gate_NS[:, :-1].to(out_ND.dtype), experts.down_bias)


def run_chosen(
    experts: ExpertWeights,
    hidden_ND: torch.Tensor,
    slots_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Pairs of row and expert, sorted by expert, in one grouped product for each projection.

    Pairs whose expert is elsewhere come last. A CPU drops them; a GPU takes them along, in no
    group, since to know how many they are the host would have to wait for it.
    """
    num_slots, num_choices = experts.down.shape[0], slots_NK.shape[1]
    slots_P, order_P = (slots_NK.flatten() % (num_slots + 1)).sort(stable=True)
    ends = torch.searchsorted(
        slots_P, torch.arange(num_slots, device=slots_P.device), right=True, out_int32=True
    )
    has_others = not is_known(slots_P)
    if not has_others:
        num_here = int(ends[-1])
        slots_P, order_P = slots_P[:num_here], order_P[:num_here]
    if slots_P.shape[0] == 0:
        return torch.zeros_like(hidden_ND)
    rows_P = order_P // num_choices
    inside_P = slots_P.clamp(max=num_slots - 1) if has_others else slots_P
    out_PD = apply_grouped(experts, hidden_ND.index_select(0, rows_P), inside_P, ends)
    out_PD = out_PD * weights_NK.flatten()[order_P].to(out_PD.dtype)[:, None]
    if has_others:
        out_PD = out_PD.masked_fill((slots_P == num_slots)[:, None], 0)
    return torch.zeros_like(hidden_ND).index_add_(0, rows_P, out_PD)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether the host may look at values without waiting for a GPU."""
    return tensor.is_cpu


def apply_grouped(
    experts: ExpertWeights, hidden_PD: torch.Tensor, slots_P: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Experts on rows sorted by slot; `ends` (int32) is where each slot's rows end."""
    inner = functional.grouped_mm(hidden_PD, experts.gate_up, offs=ends)
    if experts.gate_up_bias is not None:
        inner = inner + experts.gate_up_bias[slots_P]
    out_PD = functional.grouped_mm(activate(inner, experts.activation), experts.down, offs=ends)
    return out_PD if experts.down_bias is None else out_PD + experts.down_bias[slots_P]


def run_dense(expert: ExpertWeights, hidden_TD: torch.Tensor) -> torch.Tensor:
    """A dense block, kept as one expert."""
    bias = None if expert.gate_up_bias is None else expert.gate_up_bias[0]
    inner = activate(linear(hidden_TD, expert.gate_up[0], bias), expert.activation)
    return linear(inner, expert.down[0], None if expert.down_bias is None else expert.down_bias[0])


def activate(inner: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What lies between an expert's two products; of `inner`, the gate's columns come first."""
    if activation.kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation.kind == "gelu_tanh" else "none"
        return functional.gelu(inner, approximate=approximate)
    width = inner.shape[1] // 2
    gate, up = inner[:, :width], inner[:, width:]
    if activation.kind == "silu":
        return functional.silu(gate) * up
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Rows times a weight (in, out), and its bias if there is one."""
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
