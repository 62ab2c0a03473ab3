# Triton reads arguments without annotations.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: ANN001, ANN202
"""Experts of few rows on a GPU: each pair of row and expert reads the expert's weights once.

A grouped product sorts pairs by expert first and is made for many rows of each. With one row of each
what counts is that weights stream in and that little is launched: two kernels and a sum, here.

Shape suffixes: T rows, K choices, P (row, choice) pairs, D hidden size, F width of an expert, C parts
of the width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from exflow.runtime.expert_weights import ExpertWeights

# Columns and elements of a sum that a program takes at a time, and its warps: of ten choices the fastest
# on an H100 for Mixtral-8x7B and Qwen3-30B-A3B, and for DeepSeek-V2-Lite but for four warps in the
# second. They are fixed, so that the order of sums is.
GATE_UP_TILE = {"TILE_F": 16, "TILE_D": 128, "num_warps": 8}
DOWN_TILE = {"TILE_F": 32, "TILE_D": 64, "num_warps": 8}
# The second product's sums are split until there are so many tiles of 64 columns, or so many parts.
ENOUGH_TILES = 1024
MAX_PARTS = 8


def run_pairs(
    experts: ExpertWeights,
    hidden_TD: torch.Tensor,
    slots_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of what experts with a SiLU gate make of each row.

    Args:
        experts: the rank's experts at this layer.
        hidden_TD: normed rows.
        slots_TK: the rank's slot of each choice, -1 where another rank runs it.
        weights_TK: gate weights, float32.
    """
    num_rows, top_k = slots_TK.shape
    _, width, hidden_size = experts.down.shape
    num_pairs, slots_TK = num_rows * top_k, slots_TK.contiguous()
    num_parts = min(max(1, ENOUGH_TILES // (num_pairs * triton.cdiv(hidden_size, 64))), MAX_PARTS)
    inner_PF = hidden_TD.new_empty((num_pairs, width))
    parts_TCD = hidden_TD.new_empty((num_rows, top_k * num_parts, hidden_size), dtype=torch.float32)
    _multiply_gate_and_up[num_pairs, triton.cdiv(width, GATE_UP_TILE["TILE_F"])](
        hidden_TD.contiguous(),
        experts.gate_up,
        slots_TK,
        inner_PF,
        *experts.gate_up.stride(),
        top_k,
        hidden_size,
        width,
        **GATE_UP_TILE,
    )
    _multiply_down[num_pairs, triton.cdiv(hidden_size, DOWN_TILE["TILE_D"]), num_parts](
        inner_PF,
        experts.down,
        slots_TK,
        weights_TK.contiguous(),
        parts_TCD,
        hidden_size,
        width,
        triton.cdiv(width, num_parts),
        **DOWN_TILE,
    )
    return parts_TCD.sum(dim=1).to(hidden_TD.dtype)


@triton.jit
def _multiply_gate_and_up(
    rows,
    gate_up,
    slots,
    inner,
    slot_stride,
    in_stride,
    out_stride,
    top_k: tl.constexpr,
    hidden_size: tl.constexpr,
    width: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """A tile of a pair's gate and up, and the activation between."""
    pair = tl.program_id(0)
    slot = tl.load(slots + pair)
    if slot >= 0:
        column = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
        gate = tl.zeros((TILE_F, TILE_D), tl.float32)
        up = tl.zeros((TILE_F, TILE_D), tl.float32)
        row = rows + (pair // top_k).to(tl.int64) * hidden_size
        gates = gate_up + slot.to(tl.int64) * slot_stride + column[:, None] * out_stride
        ups = gates + width * out_stride
        for start in range(0, hidden_size, TILE_D):
            place = start + tl.arange(0, TILE_D)
            is_inside = (column < width)[:, None] & (place < hidden_size)[None, :]
            element = tl.load(row + place, mask=place < hidden_size, other=0.0).to(tl.float32)
            offset = place[None, :] * in_stride
            gate += tl.load(gates + offset, mask=is_inside, other=0.0) * element[None, :]
            up += tl.load(ups + offset, mask=is_inside, other=0.0) * element[None, :]
        gate_sum, up_sum = tl.sum(gate, axis=1), tl.sum(up, axis=1)
        found = gate_sum * tl.sigmoid(gate_sum) * up_sum
        target = inner + pair.to(tl.int64) * width + column
        tl.store(target, found.to(inner.dtype.element_ty), mask=column < width)


@triton.jit
def _multiply_down(
    inner,
    down,
    slots,
    weights,
    parts,
    hidden_size: tl.constexpr,
    width: tl.constexpr,
    part_width: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """A tile of what a pair adds to its row, over a part of the width, times the gate weight."""
    pair, part = tl.program_id(0), tl.program_id(2)
    slot = tl.load(slots + pair)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    total = tl.zeros((TILE_F, TILE_D), tl.float32)
    weight = 0.0
    if slot >= 0:
        weight = tl.load(weights + pair)
        row = inner + pair.to(tl.int64) * width
        matrix = down + slot.to(tl.int64) * hidden_size * width + column[None, :]
        first = part * part_width
        end = tl.minimum(first + part_width, width)
        for start in range(0, part_width, TILE_F):
            place = first + start + tl.arange(0, TILE_F)
            is_inside = (place < end)[:, None] & (column < hidden_size)[None, :]
            element = tl.load(row + place, mask=place < end, other=0.0).to(tl.float32)
            offset = place[:, None] * hidden_size
            total += tl.load(matrix + offset, mask=is_inside, other=0.0) * element[:, None]
    found = tl.sum(total, axis=0) * weight
    target = parts + (pair.to(tl.int64) * tl.num_programs(2) + part) * hidden_size + column
    tl.store(target, found, mask=column < hidden_size)
