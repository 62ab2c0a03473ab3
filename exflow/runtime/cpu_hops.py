"""`hops.py` compiled for CPUs, where PyTorch takes longer to start than to compute.

Shape suffixes: T tokens owned, N rows, M places in a buffer, K choices, W ranks, J ranks of a node,
X numbers of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from exflow.runtime.cpu_kernels import kernel

if TYPE_CHECKING:
    from exflow.runtime.tables import Place

Integers: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
Laid: TypeAlias = tuple[torch.Tensor, list[int]]


@kernel()
def order_by_rank(wanted_NW: Flags) -> tuple[Integers, Integers]:
    """`hops.order_by_rank`."""
    num_rows, num_ranks = wanted_NW.shape
    counts_W = np.zeros(num_ranks, np.int64)
    for n in range(num_rows):
        for w in range(num_ranks):
            counts_W[w] += wanted_NW[n, w]
    rows_M, m = np.empty(counts_W.sum(), np.int64), 0
    for w in range(num_ranks):
        for n in range(num_rows):
            if wanted_NW[n, w]:
                rows_M[m] = n
                m += 1
    return rows_M, counts_W


@kernel()
def relay_of(runs_W: Flags, node: int, end: int, per_node: int) -> int:
    """The rank of a node that talks with `end` on another; -1 if none runs an expert."""
    for step in range(per_node):
        rank = node * per_node + (end + step) % per_node
        if runs_W[rank]:
            return rank
    return -1


@kernel("(i8[:, :], i8[:], b1, i8, i8, i8)")
def lay_out_departures(
    ranks_TK: Integers,
    next_T: Integers,
    owners_move: bool,
    rank: int,
    num_ranks: int,
    per_node: int,
) -> tuple[Integers, NDArray[np.int32]]:
    """`hops.find_departures`."""
    num_tokens = len(ranks_TK)
    num_moves = num_ranks if owners_move else 0
    num_fans = per_node if per_node > 1 else 0
    heads_WX = np.zeros((num_ranks, 1 + num_moves + num_fans), np.int32)
    direct_TW = np.zeros((num_tokens, num_ranks), np.bool_)
    runs_W = np.empty(num_ranks, np.bool_)
    for t in range(num_tokens):
        runs_W[:] = False
        for k in range(ranks_TK.shape[1]):
            runs_W[ranks_TK[t, k]] = True
        for w in range(num_ranks):
            if not runs_W[w]:
                continue
            node = w // per_node
            via = w if node == rank // per_node else relay_of(runs_W, node, rank, per_node)
            if via == w:
                direct_TW[t, w] = True
            else:
                heads_WX[w, 1 + num_moves + via % per_node] += 1
        if owners_move:
            direct_TW[t, rank] |= next_T[t] == rank
            heads_WX[:, 1 + next_T[t]] += 1
    token_M, counts_W = order_by_rank(direct_TW)
    heads_WX[:, 0] = counts_W
    return token_M, heads_WX


@kernel("(i8[:, :], i8, i8, i8, i8)")
def lay_out_fans(
    ranks_NK: Integers, first_near: int, end_near: int, rank: int, per_node: int
) -> tuple[Integers, Integers]:
    """`hops.find_fans`."""
    runs_NJ = np.zeros((len(ranks_NK), per_node), np.bool_)
    for n in range(len(ranks_NK)):
        if first_near <= n < end_near:
            continue
        for k in range(ranks_NK.shape[1]):
            runner = ranks_NK[n, k]
            if runner // per_node == rank // per_node and runner != rank:
                runs_NJ[n, runner % per_node] = True
    return order_by_rank(runs_NJ)


@kernel("(i8[:, :], i8[:], i8, i8, i8)")
def lay_out_sums(
    ranks_NK: Integers, next_N: Integers, rank: int, num_ranks: int, per_node: int
) -> tuple[tuple[Integers, Integers], ...]:
    """`hops.find_sums`: what is lent, borrowed, sent, mine, received."""
    num_rows, here = len(ranks_NK), rank // per_node
    lent_NJ = np.zeros((num_rows, per_node), np.bool_)
    borrowed_NJ = np.zeros((num_rows, per_node), np.bool_)
    sent_NW = np.zeros((num_rows, num_ranks), np.bool_)
    mine_N1 = np.zeros((num_rows, 1), np.bool_)
    received_TW = np.zeros((num_rows, num_ranks), np.bool_)
    runs_W = np.empty(num_ranks, np.bool_)
    num_mine = 0
    for n in range(num_rows):
        runs_W[:] = False
        for k in range(ranks_NK.shape[1]):
            runs_W[ranks_NK[n, k]] = True
        end = next_N[n]
        is_near = end // per_node == here
        if runs_W[rank]:
            via = rank if is_near else relay_of(runs_W, here, end, per_node)
            if via != rank:
                lent_NJ[n, via % per_node] = True
            else:
                sent_NW[n, end] = True
                for j in range(per_node):
                    other = here * per_node + j
                    borrowed_NJ[n, j] = not is_near and other != rank and runs_W[other]
        if end == rank:
            mine_N1[n, 0] = True
            for w in range(num_ranks):
                node = w // per_node
                is_direct = node == here or relay_of(runs_W, node, rank, per_node) == w
                received_TW[num_mine, w] = runs_W[w] and is_direct
            num_mine += 1
    return (
        order_by_rank(lent_NJ),
        order_by_rank(borrowed_NJ),
        order_by_rank(sent_NW),
        order_by_rank(mine_N1),
        order_by_rank(received_TW[:num_mine]),
    )


NOBODY = np.empty(0, np.int64)


def find_departures(
    ranks_TK: torch.Tensor, next_T: torch.Tensor | None, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hops.find_departures`."""
    owners_move = next_T is not None
    token_M, heads_WX = lay_out_departures(
        ranks_TK.numpy(),
        NOBODY if next_T is None else next_T.numpy(),
        owners_move,
        place.rank,
        place.num_ranks,
        place.ranks_per_node,
    )
    return torch.from_numpy(token_M), torch.from_numpy(heads_WX)


def find_fans(ranks_NK: torch.Tensor, near: slice, place: Place) -> Laid:
    """`hops.find_fans`."""
    arguments = (ranks_NK.numpy(), near.start, near.stop, place.rank, place.ranks_per_node)
    return _laid(*lay_out_fans(*arguments))


def find_sums(ranks_NK: torch.Tensor, next_N: torch.Tensor, place: Place) -> list[Laid]:
    """Of `hops.find_sums` what is lent, borrowed, sent, mine (of one rank) and received."""
    found = lay_out_sums(
        ranks_NK.numpy(), next_N.numpy(), place.rank, place.num_ranks, place.ranks_per_node
    )
    return [_laid(*places) for places in found]


def _laid(rows_M: Integers, counts: Integers) -> Laid:
    return torch.from_numpy(rows_M), counts.tolist()
