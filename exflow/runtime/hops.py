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
from typing import TYPE_CHECKING

import torch

from exflow.runtime import cpu_hops
from exflow.runtime.experts import is_known
from exflow.runtime.tables import order_by_rank, ranks_that_run
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """The way of partial sums where owners move.

    Attributes:
        lent_M: rows whose sums go to the relays of this node, one after the other.
        lent_counts: how many to each rank of the node.
        borrowed_M: rows that the sums are added to which this rank gets as a relay.
        borrowed_counts: how many from each rank of the node.
        sent_M: rows whose sums go to their next owners.
        sent_counts: how many to each rank.
        mine_T: rows whose tokens stay here.
        token_M: the token, among those, that each sum from a next owner's ranks is added to.
        received_counts: how many from each rank.
    """

    lent_M: torch.Tensor
    lent_counts: list[int]
    borrowed_M: torch.Tensor
    borrowed_counts: list[int]
    sent_M: torch.Tensor
    sent_counts: list[int]
    mine_T: torch.Tensor
    token_M: torch.Tensor
    received_counts: list[int]


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
    runs_TW = ranks_that_run(ranks_TK, num_ranks)
    owner_T = torch.full_like(ranks_TK[:, 0], place.rank)
    via_TW = relays(runs_TW, owner_T, place.node_of_rank(device))
    is_direct_TW = via_TW == torch.arange(num_ranks, device=device)
    direct_TW = runs_TW & is_direct_TW
    heads = []
    if next_T is not None:
        direct_TW[:, place.rank] |= next_T == place.rank
        moves_W = torch.bincount(next_T, minlength=num_ranks)
        heads.append(moves_W.expand(num_ranks, num_ranks))
    if per_node > 1:
        fanned = (runs_TW & ~is_direct_TW).nonzero()
        numbers = fanned[:, 1] * per_node + via_TW[fanned[:, 0], fanned[:, 1]] % per_node
        fans = torch.bincount(numbers, minlength=num_ranks * per_node)
        heads.append(fans.view(num_ranks, per_node))
    counts_W1 = direct_TW.sum(dim=0)[:, None]
    token_M = direct_TW.t().nonzero()[:, 1]
    return token_M, torch.cat([counts_W1, *heads], dim=1).to(torch.int32)


def find_fans(ranks_NK: torch.Tensor, near: slice, place: Place) -> tuple[torch.Tensor, list[int]]:
    """The rows from other nodes that go on to the ranks of this one, and how many to each.

    Args:
        ranks_NK: who runs the experts of the rows that crossed.
        near: the rows that came from this node.
        place: this rank.
    """
    if is_known(ranks_NK):
        return cpu_hops.find_fans(ranks_NK, near, place)
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
        return Sums(**cpu_hops.find_sums(ranks_NK, next_N, place))
    rank, num_ranks, node = place.rank, place.num_ranks, place.node
    node_of_rank = place.node_of_rank(ranks_NK.device)
    runs_NW = ranks_that_run(ranks_NK, num_ranks)
    via_NW = relays(runs_NW, next_N, node_of_rank)
    runs_N, via_N = runs_NW[:, rank], via_NW[:, rank]
    lends_N = runs_N & (via_N != rank)
    lent_M, lent_counts = order_by_rank(
        ranks_that_run(via_N[:, None], num_ranks)[:, node] & lends_N[:, None]
    )
    is_far_N = node_of_rank[next_N] != node_of_rank[rank]
    relays_N = runs_N & (via_N == rank)
    others_NJ = runs_NW[:, node].clone()
    others_NJ[:, rank - node.start] = False
    borrowed_M, borrowed_counts = order_by_rank(others_NJ & (relays_N & is_far_N)[:, None])
    goes_NW = ranks_that_run(next_N[:, None], num_ranks)
    sent_M, sent_counts = order_by_rank(goes_NW & relays_N[:, None])
    mine_T = (next_N == rank).nonzero()[:, 0]
    is_direct_TW = via_NW.index_select(0, mine_T) == torch.arange(num_ranks, device=next_N.device)
    token_M, received_counts = order_by_rank(runs_NW.index_select(0, mine_T) & is_direct_TW)
    return Sums(
        lent_M=lent_M,
        lent_counts=lent_counts,
        borrowed_M=borrowed_M,
        borrowed_counts=borrowed_counts,
        sent_M=sent_M,
        sent_counts=sent_counts,
        mine_T=mine_T,
        token_M=token_M,
        received_counts=received_counts,
    )
