"""Which row goes where: the index arithmetic of dispatch and combine.

A row goes to a *direct* receiver, or to a relay, which passes it on inside its node (see
`placement.rules.relays`); with one rank a node every receiver is direct, which is flat dispatch.

PyTorch's functions here run on GPUs and are the specification of `cpu_hops.py`, which has the same
compiled for CPUs; tests/unit/test_hops.py compares the two.

Shape suffixes: T tokens owned, N rows, M places in a buffer, K choices, W ranks, J ranks of a node,
X numbers of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from exflow.runtime import cpu_hops
from exflow.runtime.experts import is_known
from placement.rules import relays

if TYPE_CHECKING:
    from exflow.runtime.tables import Place, PlacementTables


@dataclass(frozen=True, kw_only=True, eq=False)
class Departure:
    """The first hop of a rank's own tokens.

    Attributes:
        choices_TK: who runs their experts.
        next_T: their next owners; None where owners do not move.
        token_M: the token in each place of the messages, rank by rank.
        heads_WX: int32, what each rank is told: how many rows come; where owners move, how many of
            this rank's tokens go to each rank; with relays, how many rows each of its node will
            pass on to it.
    """

    choices_TK: torch.Tensor
    next_T: torch.Tensor | None
    token_M: torch.Tensor
    heads_WX: torch.Tensor


class Laid(NamedTuple):
    """Rows laid out for an all-to-all, rank by rank.

    Attributes:
        rows_M: the row in each place.
        counts: places of each rank, those of other nodes left out where the exchange is inside one.
    """

    rows_M: torch.Tensor
    counts: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """The way of partial sums where owners move.

    Attributes:
        lent: rows whose sums go to the relays of this node.
        borrowed: rows that the sums are added to which this rank gets as a relay.
        sent: rows whose sums go to their next owners.
        mine_T: rows whose tokens stay here.
        received: the token, among those, that each sum is added to which its next owner gets.
    """

    lent: Laid
    borrowed: Laid
    sent: Laid
    mine_T: torch.Tensor
    received: Laid


def depart(
    tables: PlacementTables,
    place: Place,
    layer: int,
    expert_ids_TK: torch.Tensor,
    *,
    owners_move: bool,
) -> Departure:
    """Where the tokens of a rank go.

    Args:
        tables: the plan.
        place: this rank.
        layer: index among the MoE layers.
        expert_ids_TK: the tokens' experts, by falling gate weight.
        owners_move: whether the next owner, too, gets a row.
    """
    next_T = None
    if owners_move:
        choices_TK, next_T = tables.route(layer, expert_ids_TK)
    else:
        choices_TK = tables.choose(layer, expert_ids_TK)
    ranks_TK = choices_TK // tables.num_experts
    token_M, heads_WX = find_departures(ranks_TK, next_T, place)
    return Departure(choices_TK=choices_TK, next_T=next_T, token_M=token_M, heads_WX=heads_WX)


def find_departures(
    ranks_TK: torch.Tensor, next_T: torch.Tensor | None, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of `Departure`, and its heads."""
    if is_known(ranks_TK):
        return cpu_hops.find_departures(ranks_TK, next_T, place)
    device, num_ranks, per_node = ranks_TK.device, place.num_ranks, place.ranks_per_node
    direct_TW, heads = ranks_that_run(ranks_TK, num_ranks), []
    if next_T is not None:
        moves_W = torch.bincount(next_T, minlength=num_ranks)
        heads.append(moves_W.expand(num_ranks, num_ranks))
    if per_node > 1:
        owner_T = torch.full_like(ranks_TK[:, 0], place.rank)
        via_TW = relays(direct_TW, owner_T, place.node_of_rank(device))
        is_direct_TW = via_TW == torch.arange(num_ranks, device=device)
        fanned = (direct_TW & ~is_direct_TW).nonzero()
        numbers = fanned[:, 1] * per_node + via_TW[fanned[:, 0], fanned[:, 1]] % per_node
        fans = torch.bincount(numbers, minlength=num_ranks * per_node)
        heads.append(fans.view(num_ranks, per_node))
        direct_TW &= is_direct_TW
    if next_T is not None:
        direct_TW[:, place.rank] |= next_T == place.rank
    counts_W1 = direct_TW.sum(dim=0)[:, None]
    token_M = direct_TW.t().nonzero()[:, 1]
    return token_M, torch.cat([counts_W1, *heads], dim=1).to(torch.int32)


def find_fans(ranks_NK: torch.Tensor, near: slice, place: Place) -> Laid:
    """The rows from other nodes that go on to the ranks of this one.

    Args:
        ranks_NK: who runs the experts of the rows that crossed.
        near: the rows that came from this node.
        place: this rank.
    """
    if is_known(ranks_NK):
        return Laid(*cpu_hops.find_fans(ranks_NK, near, place))
    runs_NJ = ranks_that_run(ranks_NK, place.num_ranks)[:, place.node].clone()
    runs_NJ[:, place.rank - place.node.start] = False
    runs_NJ[near] = False
    return order_by_rank(runs_NJ)


def find_sums(ranks_NK: torch.Tensor, next_N: torch.Tensor, place: Place) -> Sums:
    """The way of partial sums to the next owners.

    Args:
        ranks_NK: who runs the experts of the rows that are here.
        next_N: the next owners of their tokens.
        place: this rank.
    """
    if is_known(ranks_NK):
        lent, borrowed, sent, mine, received = cpu_hops.find_sums(ranks_NK, next_N, place)
        return Sums(
            lent=Laid(*lent),
            borrowed=Laid(*borrowed),
            sent=Laid(*sent),
            mine_T=mine[0],
            received=Laid(*received),
        )
    rank, num_ranks = place.rank, place.num_ranks
    runs_NW = ranks_that_run(ranks_NK, num_ranks)
    mine_T = (next_N == rank).nonzero()[:, 0]
    relayed_NW, lent, borrowed = runs_NW, *[Laid(mine_T[:0], [0])] * 2
    if place.ranks_per_node > 1:
        node_of_rank = place.node_of_rank(ranks_NK.device)
        via_NW = relays(runs_NW, next_N, node_of_rank)
        is_far_N = node_of_rank[next_N] != node_of_rank[rank]
        lent, borrowed = _find_loans(runs_NW, via_NW[:, rank], is_far_N, place)
        relayed_NW = runs_NW & (via_NW == torch.arange(num_ranks, device=ranks_NK.device))
    goes_NW = ranks_that_run(next_N[:, None], num_ranks)
    return Sums(
        lent=lent,
        borrowed=borrowed,
        sent=order_by_rank(goes_NW & relayed_NW[:, rank, None]),
        mine_T=mine_T,
        received=order_by_rank(relayed_NW.index_select(0, mine_T)),
    )


def _find_loans(
    runs_NW: torch.Tensor, via_N: torch.Tensor, is_far_N: torch.Tensor, place: Place
) -> tuple[Laid, Laid]:
    """What this rank lends to relays of its node, and borrows as one.

    Args:
        runs_NW: who runs experts of the rows that are here.
        via_N: the relay of this node.
        is_far_N: whether the next owner is on another node.
        place: this rank.
    """
    runs_N = runs_NW[:, place.rank]
    goes_NJ = ranks_that_run(via_N[:, None], place.num_ranks)[:, place.node]
    lent = order_by_rank(goes_NJ & (runs_N & (via_N != place.rank))[:, None])
    others_NJ = runs_NW[:, place.node].clone()
    others_NJ[:, place.rank - place.node.start] = False
    relays_N = runs_N & (via_N == place.rank) & is_far_N
    return lent, order_by_rank(others_NJ & relays_N[:, None])


def ranks_that_run(ranks_TK: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Bool (T, W): whether a rank runs any of a token's experts.

    >>> ranks_that_run(torch.tensor([[2, 0], [1, 1]]), 3).tolist()
    [[True, False, True], [False, True, False]]
    """
    runs_TW = ranks_TK.new_zeros((len(ranks_TK), num_ranks), dtype=torch.bool)
    return runs_TW.scatter_(1, ranks_TK, value=True)


def order_by_rank(wanted_TW: torch.Tensor) -> Laid:
    """The rows to lay out for an all-to-all: rank by rank, in rising order within one.

    Args:
        wanted_TW: whether row t goes to (or comes from) rank w.

    >>> rows, counts = order_by_rank(torch.tensor([[True, False], [True, True]]))
    >>> rows.tolist(), counts
    ([0, 1, 1], [2, 1])
    """
    return Laid(wanted_TW.t().nonzero()[:, 1], wanted_TW.sum(dim=0).tolist())
