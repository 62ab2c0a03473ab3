"""Hierarchical dispatchers: a token crosses to a node once, and is fanned out there.

    node 0            | node 1
    owner 0 -- row -----> rank 2 (relay) -- row --> rank 3
    owner 0 <-- sum ----- rank 2 (relay) <-- sum -- rank 3

The relay is one of the ranks that run the token's experts (`placement.rules.relays`), so there
are as many rows as in flat dispatch, and fewer of them on the slow links.

Messages a MoE layer: four, two of them inside nodes, where flat dispatch has two. Rows cross with the
numbers of both hops, then fan out; partial sums are added on their node, then cross. On GPUs the
numbers go before.

Shape suffixes: T tokens owned, N rows, M places in a buffer, K choices, D hidden size, B bytes of
a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.runtime.coherent import CoherentRecord, coherent_rows, collect_sums
from exflow.runtime.dispatcher import Tokens, exchange_partials, rows_of, send_tokens
from exflow.runtime.hops import find_fans, find_sums

if TYPE_CHECKING:
    from exflow.runtime.dispatcher import Rows
    from exflow.runtime.rows import RowFormat
    from exflow.runtime.tables import PlacementTables
    from exflow.runtime.wire import Arrival, Wire


@dataclass(frozen=True, kw_only=True, eq=False)
class Fan:
    """The second hop, inside a node.

    Attributes:
        sent_M: of the rows that crossed to this rank, those that it passed on, rank by rank.
        sent_counts: how many to each rank of the node.
        received_counts: how many from each.
    """

    sent_M: torch.Tensor
    sent_counts: list[int]
    received_counts: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class HomeHopsRecord:
    """What `HierarchicalHomeDispatcher.combine` needs: both hops, to go back by."""

    layer: int
    tokens: Tokens
    token_M: torch.Tensor
    sent_counts: list[int]
    received_counts: list[int]
    fan: Fan


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
        tables, row_format = self.tables, self.format
        departure, arrival = send_tokens(
            row_format, tables, self.wire, tables.place, layer, tokens, expert_ids_TK, weights_TK
        )
        rows_NB, fan = fan_out(row_format, tables, self.wire, layer, arrival, arrival.totals)
        record = HomeHopsRecord(
            layer=layer,
            tokens=tokens,
            token_M=departure.token_M,
            sent_counts=arrival.sent_counts,
            received_counts=arrival.received_counts,
            fan=fan,
        )
        metadata = row_format.metadata(rows_NB)
        return rows_of(row_format, tables, layer, rows_NB, metadata), record

    def residual(self, record: HomeHopsRecord) -> torch.Tensor:
        """The tokens stay."""
        return record.tokens.hidden

    def combine(self, partial_ND: torch.Tensor, record: HomeHopsRecord) -> Tokens:
        """Partial sums return to the relays, are added there, and go on to the owners."""
        fan, num_crossed = record.fan, sum(record.received_counts)
        returned_MD = exchange_partials(
            self.wire,
            partial_ND[num_crossed:],
            fan.received_counts,
            fan.sent_counts,
            record.layer,
            in_node=True,
        )
        sums_ND = partial_ND[:num_crossed].index_add(0, fan.sent_M, returned_MD)
        returned_MD = exchange_partials(
            self.wire, sums_ND, record.received_counts, record.sent_counts, record.layer
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
        tables, row_format = self.tables, self.format
        _, arrival = send_tokens(
            row_format, tables, self.wire, tables.place, layer, tokens, expert_ids_TK, weights_TK
        )
        owned, fans = arrival.totals[: tables.num_ranks], arrival.totals[tables.num_ranks :]
        rows_NB, _ = fan_out(row_format, tables, self.wire, layer, arrival, fans)
        slots_N, _ = row_format.metadata(rows_NB).owners
        rows_NB = rows_NB.index_select(0, slots_N.argsort())
        return coherent_rows(row_format, tables, layer, rows_NB, owned=tuple(owned))

    def residual(self, record: CoherentRecord) -> torch.Tensor:
        """Of the rows that came, those whose tokens stay here."""
        return record.hidden_ND.index_select(
            0, (record.next_owner_N == self.tables.rank).nonzero()[:, 0]
        )

    def combine(self, partial_ND: torch.Tensor, record: CoherentRecord) -> Tokens:
        """Partial sums are added on their node by one rank, then go to the next owners."""
        sums = find_sums(record.ranks_NK, record.next_owner_N, self.tables.place)
        returned_MD = exchange_partials(
            self.wire,
            partial_ND.index_select(0, sums.lent.rows_M),
            sums.lent.counts,
            sums.borrowed.counts,
            record.layer,
            in_node=True,
        )
        sums_ND = partial_ND.index_add(0, sums.borrowed.rows_M, returned_MD)
        return collect_sums(self.wire, sums_ND, record, sums)


def fan_out(
    row_format: RowFormat,
    tables: PlacementTables,
    wire: Wire,
    layer: int,
    arrival: Arrival,
    received_counts: list[int],
) -> tuple[torch.Tensor, Fan]:
    """Rows from other nodes go on from relays to the other ranks of their node.

    Returns:
        Rows that crossed to this rank, then those that relays passed on to it; and the second hop.
    """
    node, counts = tables.place.node, arrival.received_counts
    near = slice(sum(counts[: node.start]), sum(counts[: node.stop]))
    ranks_NK = row_format.metadata(arrival.rows_NB).choices // tables.num_experts
    sent_M, sent_counts = find_fans(ranks_NK, near, tables.place)
    fanned_NB = wire.exchange_rows(
        arrival.rows_NB.index_select(0, sent_M),
        sent_counts,
        received_counts,
        kind="dispatch",
        layer=layer,
        payload_bytes=row_format.payload_bytes,
        in_node=True,
    )
    fan = Fan(sent_M=sent_M, sent_counts=sent_counts, received_counts=received_counts)
    return torch.cat([arrival.rows_NB, fanned_NB]), fan
