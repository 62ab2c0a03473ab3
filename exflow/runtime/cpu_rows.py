"""Rows and messages on CPUs, compiled: `rows.py` and `wire.py` say what they are.

Everything is a whole number of 32-bit words. Shape suffixes: T tokens, N rows, M places in the
messages, K choices, W ranks, X numbers of a head, Y words of a row, H words of a hidden state, O
words of slot and next owner: two where they travel, or none.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from exflow.runtime.cpu_kernels import kernel

Integers: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.int32]


@kernel("(i4[:, :], i8[:, :], i4[:, :], i8[:, :])")
def pack(hidden_TH: Words, choices_TK: Integers, weights_TK: Words, owners_OT: Integers) -> Words:
    """`RowFormat.pack`."""
    num_tokens, size = hidden_TH.shape
    top_k, num_owners = choices_TK.shape[1], len(owners_OT)
    rows_TY = np.empty((num_tokens, size + 2 * top_k + num_owners), np.int32)
    for t in range(num_tokens):
        rows_TY[t, :size] = hidden_TH[t]
        for k in range(top_k):
            rows_TY[t, size + k] = choices_TK[t, k]
            rows_TY[t, size + top_k + k] = weights_TK[t, k]
        for o in range(num_owners):
            rows_TY[t, size + 2 * top_k + o] = owners_OT[o, t]
    return rows_TY


@kernel("(i4[:, :], i8, i8)")
def unpack(rows_NY: Words, top_k: int, num_owners: int) -> tuple[Integers, Words, Integers]:
    """(N, K) choices, (N, K) weights and (O, N) slots and next owners."""
    num_rows = len(rows_NY)
    size = rows_NY.shape[1] - 2 * top_k - num_owners
    choices_NK = np.empty((num_rows, top_k), np.int64)
    weights_NK = np.empty((num_rows, top_k), np.int32)
    owners_ON = np.empty((num_owners, num_rows), np.int64)
    for n in range(num_rows):
        for k in range(top_k):
            choices_NK[n, k] = rows_NY[n, size + k]
            weights_NK[n, k] = rows_NY[n, size + top_k + k]
        for o in range(num_owners):
            owners_ON[o, n] = rows_NY[n, size + 2 * top_k + o]
    return choices_NK, weights_NK, owners_ON


@kernel("(i4[:, ::1], i8[::1], i4[:, ::1])")
def write_messages(rows_TY: Words, token_M: Integers, heads_WX: Words) -> tuple[Words, Integers]:
    """The messages to all ranks, each head and rows, and how many words each has."""
    num_ranks, num_numbers = heads_WX.shape
    width, place, m = rows_TY.shape[1], 0, 0
    messages = np.empty(heads_WX.size + len(token_M) * width, np.int32)
    sizes_W = np.empty(num_ranks, np.int64)
    for w in range(num_ranks):
        sizes_W[w] = num_numbers + heads_WX[w, 0] * width
        messages[place : place + num_numbers] = heads_WX[w]
        place += num_numbers
        for _ in range(heads_WX[w, 0]):
            messages[place : place + width] = rows_TY[token_M[m]]
            place += width
            m += 1
    return messages, sizes_W


@kernel("(i4[::1], i8[::1], i4[::1], i8, i8, i8)")
def read_messages(
    received: Words, sizes_W: Integers, kept: Words, rank: int, num_numbers: int, width: int
) -> tuple[Words, Words]:
    """What came from all ranks: (N, Y) rows and (W, X) heads.

    Args:
        received: room for what may have come from each rank, one after the other.
        sizes_W: words of that room; none for this rank.
        kept: this rank's message to itself.
        rank: this rank.
        num_numbers: X.
        width: Y.
    """
    heads_WX = np.empty((len(sizes_W), num_numbers), np.int32)
    start = 0
    for w in range(len(sizes_W)):
        heads_WX[w] = kept[:num_numbers] if w == rank else received[start : start + num_numbers]
        start += sizes_W[w]
    rows_NY = np.empty((heads_WX[:, 0].sum(), width), np.int32)
    start = n = 0
    for w in range(len(sizes_W)):
        message = kept if w == rank else received[start : start + sizes_W[w]]
        for row in range(heads_WX[w, 0]):
            first = num_numbers + row * width
            rows_NY[n] = message[first : first + width]
            n += 1
        start += sizes_W[w]
    return rows_NY, heads_WX
