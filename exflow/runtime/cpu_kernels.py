"""Kernels for little work in float32 on a CPU, where PyTorch takes longer to start than to compute.

PyTorch's path beside each call is their specification; tests/unit/test_cpu_kernels.py compares the
two. numba compiles them when this file is first imported, once for a machine. Sums may be
reordered, so that they run on vectors.

Shape suffixes: N rows, T tokens, D hidden size, X experts, K choices a row, S slots, F width of an
expert, I twice that (gate, then up), H query heads, J key-value heads, G query heads of one, R
heads that turn, A all heads, E width of a head, P pages a token may see, C tokens it sees, L tokens
of all layers in the cache, W elements the cache keeps of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Floats: TypeAlias = NDArray[np.float32]
Integers: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]

# Multiplications up to which one core is done before PyTorch's blocks and threads pay.
LITTLE = 1 << 22
ZERO, ONE, NOTHING = np.float32(0), np.float32(1), -np.float32(np.inf)


def is_little(rows: torch.Tensor, multiplications: int) -> bool:
    """Whether work on these rows is for the kernels of this file."""
    return rows.is_cpu and rows.dtype == torch.float32 and multiplications <= LITTLE


def kernel(signature: str | None = None) -> Callable[[Function], Function]:
    """Compiles a function to machine code, kept on disk: at once for a signature, else for callers.

    Where no folder can be written to, each start compiles anew.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    }

    def compiled(function: Function) -> Function:
        try:
            return cast("Function", njit(signature, cache=True, **options)(function))
        except RuntimeError:  # numba's word for a cache without a place
            return cast("Function", njit(signature, **options)(function))

    return compiled


@kernel()
def norm_row(row_D: Floats, weight_D: Floats, eps: float, out_D: Floats) -> None:
    """A row by the root of its mean square, times a weight."""
    squares = ZERO
    for d in range(len(row_D)):
        squares += row_D[d] * row_D[d]
    scale = ONE / np.sqrt(squares / np.float32(len(row_D)) + eps)
    for d in range(len(row_D)):
        out_D[d] = row_D[d] * scale * weight_D[d]


@kernel("(f4[:, ::1], f4[::1], f4, f4[:, ::1])")
def norm_rows(hidden_ND: Floats, weight_D: Floats, eps: float, out_ND: Floats) -> None:
    """RMS norm."""
    for n in range(len(hidden_ND)):
        norm_row(hidden_ND[n], weight_D, eps, out_ND[n])


@kernel()
def turn(head_E: Floats, rotation_2E: Floats) -> None:
    """Each half-pair of a head by its angle, in place; sines come with their signs."""
    half = len(head_E) // 2
    for e in range(half):
        first, second = head_E[e], head_E[half + e]
        head_E[e] = first * rotation_2E[0, e] + second * rotation_2E[1, e]
        head_E[half + e] = second * rotation_2E[0, half + e] + first * rotation_2E[1, half + e]


@kernel("(f4[:, :, ::1], i8, f4[:, ::1], f4, f4[:, :, ::1])")
def turn_heads(
    heads_TAE: Floats, num_turned: int, norm_RE: Floats, eps: float, rotation_T2E: Floats
) -> None:
    """RMS norm, if there is a weight for it, and rotary embedding of the first heads, in place."""
    for t in range(len(heads_TAE)):
        for r in range(num_turned):
            if len(norm_RE):
                norm_row(heads_TAE[t, r], norm_RE[r], eps, heads_TAE[t, r])
            turn(heads_TAE[t, r], rotation_T2E[t])


@kernel()
def exponentials(logits_C: Floats, largest: np.float32) -> np.float32:
    """The terms of a softmax, in place; their sum."""
    total = ZERO
    for c in range(len(logits_C)):
        logits_C[c] = math.exp(logits_C[c] - largest)
        total += logits_C[c]
    return total


@kernel("(f4[:, ::1], b1, f4, i8[:, ::1], f4[:, ::1])")
def choose_experts(
    logits_TX: Floats, is_normalized: bool, scale: float, ids_TK: Integers, weights_TK: Floats
) -> None:
    """The largest of each token's softmax, by falling weight; spoils the logits."""
    for t in range(len(logits_TX)):
        scores_X, chosen = logits_TX[t], ZERO
        total = exponentials(scores_X, scores_X.max())
        for k in range(ids_TK.shape[1]):
            best = scores_X.argmax()
            ids_TK[t, k], weights_TK[t, k] = best, scores_X[best]
            chosen += scores_X[best]
            scores_X[best] = -ONE
        factor = scale / (chosen if is_normalized else total)
        for k in range(ids_TK.shape[1]):
            weights_TK[t, k] *= factor


@kernel()
def enter_expert(row_D: Floats, gate_up_ID: Floats, weight: float, inner_F: Floats) -> None:
    """The first product, as weight * silu(gate) * up."""
    size = len(inner_F)
    for f in range(size):
        gates_D, ups_D = gate_up_ID[f], gate_up_ID[size + f]
        gate = up = ZERO
        for d in range(len(row_D)):
            gate += row_D[d] * gates_D[d]
            up += row_D[d] * ups_D[d]
        inner_F[f] = weight * up * gate / (ONE + math.exp(-gate))


@kernel()
def leave_expert(inner_F: Floats, down_FD: Floats, out_D: Floats) -> None:
    """Adds the second product."""
    for f in range(len(inner_F)):
        value, down_D = inner_F[f], down_FD[f]
        for d in range(len(out_D)):
            out_D[d] += value * down_D[d]


@kernel("(f4[:, ::1], f4[:, :, ::1], f4[:, :, ::1], i8[:, ::1], f4[:, ::1], f4[:, ::1])")
def run_silu_experts(
    hidden_ND: Floats,
    gate_up_SID: Floats,
    down_SFD: Floats,
    slots_NK: Integers,
    weights_NK: Floats,
    out_ND: Floats,
) -> None:
    """Each row's experts here, weighted and added up; slot by slot, to read weights once."""
    num_rows, top_k = slots_NK.shape
    inner_F = np.empty(down_SFD.shape[1], np.float32)
    out_ND[:] = ZERO
    for s in range(len(down_SFD)):
        for n in range(num_rows):
            for k in range(top_k):
                if slots_NK[n, k] == s:
                    enter_expert(hidden_ND[n], gate_up_SID[s], weights_NK[n, k], inner_F)
                    leave_expert(inner_F, down_SFD[s], out_ND[n])


@kernel()
def score(
    query_GE: Floats, cache_LW: Floats, rows_C: Words, start: int, scale: float, out_GC: Floats
) -> None:
    """The logits of queries for the keys that begin at `start` in these rows of the cache."""
    num_heads, width = query_GE.shape
    for c in range(len(rows_C)):
        key_E = cache_LW[rows_C[c], start : start + width]
        for g in range(num_heads):
            product = ZERO
            for e in range(width):
                product += query_GE[g, e] * key_E[e]
            out_GC[g, c] = product * scale


@kernel()
def add_values(
    shares_GC: Floats, cache_LW: Floats, rows_C: Words, start: int, out_GE: Floats
) -> None:
    """The values that begin at `start` in these rows of the cache, by their shares."""
    num_heads, width = out_GE.shape
    out_GE[:] = ZERO
    for c in range(len(rows_C)):
        value_E = cache_LW[rows_C[c], start : start + width]
        for g in range(num_heads):
            share = shares_GC[g, c]
            for e in range(width):
                out_GE[g, e] += share * value_E[e]


@kernel()
def share_out(logits_C: Floats, sink: np.float32) -> None:
    """Softmax, in place; the sink, unless it is minus infinity, takes its part."""
    largest = max(logits_C.max(), sink)
    total = exponentials(logits_C, largest) + math.exp(sink - largest)
    for c in range(len(logits_C)):
        logits_C[c] /= total


@kernel(
    "(f4[:, :, :], f4[:, :], f4[:, ::1], i8, i8[::1], i8[:, ::1], i8, i8[::1], i8, i8, i8,"
    " f4, f4[::1], f4[:, :, ::1])"
)
def attend_pages(
    query_THE: Floats,
    entries_TW: Floats,
    cache_LW: Floats,
    layer_start: int,
    addresses_T: Integers,
    pages_TP: Integers,
    page_size: int,
    positions_T: Integers,
    window: int,
    num_kv_heads: int,
    value_start: int,
    scale: float,
    sinks_H: Floats,
    out_THE: Floats,
) -> None:
    """Store entries, and attend to what each token sees, where it lies in the cache.

    Args:
        query_THE: queries.
        entries_TW: what the cache keeps of the tokens.
        cache_LW: all its entries.
        layer_start: where the layer's begin.
        addresses_T: where each entry goes, from there.
        pages_TP: each token's pages.
        page_size: tokens of a page.
        positions_T: the tokens' positions.
        window: how many positions a token sees, itself included.
        num_kv_heads: key-value heads.
        value_start: where the values begin in an entry.
        scale: factor on the logits.
        sinks_H: logits of attending to nothing; empty if there are none.
        out_THE: what the queries find.
    """
    num_tokens, num_heads, width = query_THE.shape
    group = num_heads // num_kv_heads
    rows_C = np.empty(pages_TP.shape[1] * page_size, np.uint64)
    shares_GC = np.empty((group, len(rows_C)), np.float32)
    query_GE = np.empty((group, width), np.float32)
    for t in range(num_tokens):
        cache_LW[layer_start + addresses_T[t]] = entries_TW[t]
        first = max(0, positions_T[t] + 1 - window)
        length = positions_T[t] + 1 - first
        for c in range(length):
            page = pages_TP[t, (first + c) // page_size]
            rows_C[c] = layer_start + page * page_size + (first + c) % page_size
        for j in range(num_kv_heads):
            heads = slice(j * group, (j + 1) * group)
            query_GE[:] = query_THE[t, heads]
            score(query_GE, cache_LW, rows_C[:length], j * width, scale, shares_GC)
            for g in range(group):
                sink = sinks_H[j * group + g] if len(sinks_H) else NOTHING
                share_out(shares_GC[g, :length], sink)
            start = value_start + j * width
            add_values(shares_GC, cache_LW, rows_C[:length], start, out_THE[t, heads])
