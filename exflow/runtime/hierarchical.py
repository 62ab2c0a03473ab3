"""Hierarchical dispatchers: a token crosses to a node once, and is fanned out there.

    node 0            | node 1
    owner 0 -- row -----> rank 2 (relay) -- row --> rank 3
    owner 0 <-- sum ----- rank 2 (relay) <-- sum -- rank 3

The relay is one of the ranks that run the token's experts (`placement.rules.relays`), so there
are as many rows as in flat dispatch, and fewer of them on the slow links.

Messages a MoE layer: four, two of them inside nodes, where flat dispatch has two. Rows cross with the
numbers of both hops, then fan out; partial sums are added on their node, then cross. On GPUs the
numbers go before.

Shape suffixes: T tokens owned, N rows, M places in a buffer, K choices, D hidden size, W ranks,
J ranks of a node, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.runtime.dispatcher import CoherentRecord, Tokens, exchange_partials, rows_of
from exflow.runtime.tables import order_by_rank, ranks_that_run

if TYPE_CHECKING:
    from exflow.runtime.dispatcher import Rows
    from exflow.runtime.rows import RowFormat
    from exflow.runtime.tables import PlacementTables
    from exflow.runtime.wire import Wire


@dataclass(frozen=True, kw_only=True, eq=False)
class Hops:
    """The way of a rank's own tokens: to direct receivers, and on from relays.

    Attributes:
        direct_TW: whether this rank sends a token's row to a rank itself.
        fans_WJ: rows that each rank will get from the relays of its node.
    """

    direct_TW: torch.Tensor
    fans_WJ: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class HomeHopsRecord:
    """What `HierarchicalHomeDispatcher.combine` needs: both hops, to go back by."""

    layer: int
    tokens: Tokens
    token_M: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]
    fanned_M: torch.Tensor
    fan_send_counts: list[int]
    fan_receive_counts: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class HierarchicalHomeDispatcher:
    """Owners never change: partial sums go back the way the rows came, added up at relays."""

    tables: PlacementTables
    format: RowFormat
    wire: Wire

    def dispatch(
        self, layer: int, tokens: Tokens, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[Rows, HomeHopsRecord]:
        """Send each token to the ranks of its experts here, and to one of every other node."""
        tables, row_format, wire = self.tables, self.format, self.wire
        choices_TK = tables.choose(layer, expert_ids_TK)
        runs_TW = ranks_that_run(choices_TK // tables.num_experts, tables.num_ranks)
        hops = find_hops(runs_TW, tables, wire.ranks_per_node)
        token_M, send_counts = order_by_rank(hops.direct_TW)
        crossed_NB, receive_counts, fans_WJ = wire.send_rows(
            row_format.pack(tokens.hidden, choices_TK, weights_TK).index_select(0, token_M),
            send_counts,
            hops.fans_WJ.tolist(),
            at_most=tokens.owned,
            layer=layer,
            payload_bytes=row_format.payload_bytes,
        )
        fan_counts = [sum(fans) for fans in zip(*fans_WJ, strict=True)]
        fanned_M, fan_send = fan_out(crossed_NB, receive_counts, tables, row_format, wire)
        fanned_NB = _fan(
            wire, row_format, crossed_NB.index_select(0, fanned_M), fan_send, fan_counts, layer
        )
        record = HomeHopsRecord(
            layer=layer,
            tokens=tokens,
            token_M=token_M,
            send_counts=send_counts,
            receive_counts=receive_counts,
            fanned_M=fanned_M,
            fan_send_counts=fan_send,
            fan_receive_counts=fan_counts,
        )
        return rows_of(row_format, tables, layer, torch.cat([crossed_NB, fanned_NB])), record

    def residual(self, record: HomeHopsRecord) -> torch.Tensor:
        """The tokens stay."""
        return record.tokens.hidden

    def combine(self, partial_ND: torch.Tensor, record: HomeHopsRecord) -> Tokens:
        """Partial sums return to the relays, are added there, and go on to the owners."""
        num_crossed = sum(record.receive_counts)
        returned_MD = exchange_partials(
            self.wire,
            partial_ND[num_crossed:],
            record.fan_receive_counts,
            record.fan_send_counts,
            record.layer,
            in_node=True,
        )
        sums_ND = partial_ND[:num_crossed].index_add(0, record.fanned_M, returned_MD)
        returned_MD = exchange_partials(
            self.wire, sums_ND, record.receive_counts, record.send_counts, record.layer
        )
        tokens = record.tokens
        total_TD = torch.zeros_like(tokens.hidden).index_add_(0, record.token_M, returned_MD)
        return Tokens(hidden=tokens.hidden + total_TD, slots=tokens.slots, owned=tokens.owned)


@dataclass(frozen=True, kw_only=True, eq=False)
class HierarchicalCoherentDispatcher:
    """The owner moves; partial sums are added on their node and cross to it once.

    Rows lie by slot on every rank, so that sender and receiver of partial sums agree on their
    order without a word.
    """

    tables: PlacementTables
    format: RowFormat
    wire: Wire

    def dispatch(
        self, layer: int, tokens: Tokens, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[Rows, CoherentRecord]:
        """Send each token, with its residual, to the ranks of its experts, by relays."""
        tables, row_format, wire = self.tables, self.format, self.wire
        choices_TK = tables.choose(layer, expert_ids_TK)
        ranks_TK = choices_TK // tables.num_experts
        next_T = tables.next_owners(layer, ranks_TK, expert_ids_TK)
        hops = find_hops(ranks_that_run(ranks_TK, tables.num_ranks), tables, wire.ranks_per_node)
        hops.direct_TW[:, tables.rank] |= next_T == tables.rank
        token_M, send_counts = order_by_rank(hops.direct_TW)
        moves = torch.bincount(next_T, minlength=tables.num_ranks).tolist()
        crossed_NB, receive_counts, heard = wire.send_rows(
            row_format.pack(
                tokens.hidden, choices_TK, weights_TK, tokens.slots, next_T
            ).index_select(0, token_M),
            send_counts,
            [moves + fans for fans in hops.fans_WJ.tolist()],
            at_most=tokens.owned,
            layer=layer,
            payload_bytes=row_format.payload_bytes,
        )
        totals = [sum(numbers) for numbers in zip(*heard, strict=True)]
        owned, fan_counts = totals[: tables.num_ranks], totals[tables.num_ranks :]
        fanned_M, fan_send = fan_out(crossed_NB, receive_counts, tables, row_format, wire)
        fanned_NB = _fan(
            wire, row_format, crossed_NB.index_select(0, fanned_M), fan_send, fan_counts, layer
        )
        rows_NB = torch.cat([crossed_NB, fanned_NB])
        rows_NB = rows_NB.index_select(0, row_format.slots(rows_NB).argsort())
        rows = rows_of(row_format, tables, layer, rows_NB)
        record = CoherentRecord(
            layer=layer,
            hidden_ND=rows.hidden,
            slots_N=row_format.slots(rows_NB),
            next_owner_N=row_format.next_owners(rows_NB),
            ranks_NK=row_format.choices(rows_NB) // tables.num_experts,
            owned=tuple(owned),
        )
        return rows, record

    def residual(self, record: CoherentRecord) -> torch.Tensor:
        """Of the rows that came, those whose tokens stay here."""
        return record.hidden_ND.index_select(
            0, (record.next_owner_N == self.tables.rank).nonzero()[:, 0]
        )

    def combine(self, partial_ND: torch.Tensor, record: CoherentRecord) -> Tokens:
        """Partial sums are added on their node by one rank, then go to the next owners."""
        tables, rank, next_N = self.tables, self.tables.rank, record.next_owner_N
        runs_NW = ranks_that_run(record.ranks_NK, tables.num_ranks)
        via_NW = tables.relays(runs_NW, next_N)
        is_last_N = via_NW[:, rank] == rank
        sums_ND = self._add_on_node(partial_ND, runs_NW, via_NW, record)
        goes_NW = ranks_that_run(next_N[:, None], tables.num_ranks)
        sent_M, send_counts = order_by_rank(goes_NW & (runs_NW[:, rank] & is_last_N)[:, None])
        mine_T = (next_N == rank).nonzero()[:, 0]
        ranks_W = torch.arange(tables.num_ranks, device=next_N.device)
        token_M, receive_counts = order_by_rank(
            runs_NW.index_select(0, mine_T) & (via_NW.index_select(0, mine_T) == ranks_W)
        )
        returned_MD = exchange_partials(
            self.wire, sums_ND.index_select(0, sent_M), send_counts, receive_counts, record.layer
        )
        hidden_TD = record.hidden_ND.index_select(0, mine_T)
        total_TD = torch.zeros_like(hidden_TD).index_add_(0, token_M, returned_MD)
        return Tokens(
            hidden=hidden_TD + total_TD,
            slots=record.slots_N.index_select(0, mine_T),
            owned=record.owned,
        )

    def _add_on_node(
        self,
        partial_ND: torch.Tensor,
        runs_NW: torch.Tensor,
        via_NW: torch.Tensor,
        record: CoherentRecord,
    ) -> torch.Tensor:
        """(N, D) partial sums, with those of the node's other ranks where this rank relays them."""
        tables, wire = self.tables, self.wire
        node = slice(wire.first_of_node, wire.first_of_node + wire.ranks_per_node)
        via_N = via_NW[:, tables.rank]
        runs_NJ = runs_NW[:, node].clone()
        leaves_N = runs_NW[:, tables.rank] & (via_N != tables.rank)
        goes_NJ = ranks_that_run(via_N[:, None], tables.num_ranks)[:, node]
        sent_M, send_counts = order_by_rank(goes_NJ & leaves_N[:, None])
        here = tables.node_of_rank[tables.rank]
        is_far_N = tables.node_of_rank[record.next_owner_N] != here
        relays_N = runs_NW[:, tables.rank] & (via_N == tables.rank) & is_far_N
        runs_NJ[:, tables.rank - wire.first_of_node] = False
        got_M, receive_counts = order_by_rank(runs_NJ & relays_N[:, None])
        returned_MD = exchange_partials(
            wire,
            partial_ND.index_select(0, sent_M),
            send_counts,
            receive_counts,
            record.layer,
            in_node=True,
        )
        return partial_ND.index_add(0, got_M, returned_MD)


def find_hops(runs_TW: torch.Tensor, tables: PlacementTables, ranks_per_node: int) -> Hops:
    """Who sends the rows of tokens that this rank owns to whom."""
    owner_T = torch.full_like(runs_TW[:, 0], tables.rank, dtype=torch.int64)
    via_TW = tables.relays(runs_TW, owner_T)
    ranks_W = torch.arange(tables.num_ranks, device=runs_TW.device)
    is_direct_TW = via_TW == ranks_W
    fanned = (runs_TW & ~is_direct_TW).nonzero()
    places = fanned[:, 1] * ranks_per_node + via_TW[fanned[:, 0], fanned[:, 1]] % ranks_per_node
    fans = torch.bincount(places, minlength=tables.num_ranks * ranks_per_node)
    return Hops(
        direct_TW=runs_TW & is_direct_TW, fans_WJ=fans.view(tables.num_ranks, ranks_per_node)
    )


def fan_out(
    crossed_NB: torch.Tensor,
    receive_counts: list[int],
    tables: PlacementTables,
    row_format: RowFormat,
    wire: Wire,
) -> tuple[torch.Tensor, list[int]]:
    """The rows from other nodes that go on to the ranks of this one, rank by rank."""
    start = wire.first_of_node
    node = slice(start, start + wire.ranks_per_node)
    first_near, end_near = sum(receive_counts[:start]), sum(receive_counts[: node.stop])
    ranks_NK = row_format.choices(crossed_NB) // tables.num_experts
    runs_NJ = ranks_that_run(ranks_NK, tables.num_ranks)[:, node].clone()
    runs_NJ[:, tables.rank - start] = False
    runs_NJ[first_near:end_near] = False
    return order_by_rank(runs_NJ)


def _fan(
    wire: Wire,
    row_format: RowFormat,
    rows_NB: torch.Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    layer: int,
) -> torch.Tensor:
    """Rows go on from relays to the other ranks of their node."""
    return wire.exchange_rows(
        rows_NB,
        send_counts,
        receive_counts,
        kind="dispatch",
        layer=layer,
        payload_bytes=row_format.payload_bytes,
        in_node=True,
    )
