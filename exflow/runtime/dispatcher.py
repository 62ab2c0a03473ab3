"""Dispatchers: bring tokens to the ranks of their experts, and the partial sums to their owners.

    home       owner 0 -- row --> rank 2 runs experts -- partial sum --> owner 0
    coherent   owner 0 -- row --> rank 2 runs most experts, adds the sums of the others and its
                                  own to the residual it got with the row, and is the next owner

`dispatch` returns rows and a frozen record, `combine` takes that record; nothing is remembered in
between. A rank that runs several of a token's experts gets its row once. The numbers of rows are
`placement.traffic.count_traffic`'s.

Messages a MoE layer: the rows with their number, and the partial sums. On GPUs the numbers go
before, in a message of their own. Partial sums are not sent where every token has one expert and
may be owned by any rank, and their numbers need no message: a row says who runs the token's experts
and who owns it next. `hierarchical.py` adds two messages inside nodes.

Shape suffixes: T tokens owned, N rows received, M places in a buffer, K choices, D hidden size,
W ranks, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from exflow.runtime.hops import depart, find_sums

if TYPE_CHECKING:
    from exflow.runtime.hops import Sums
    from exflow.runtime.rows import Metadata, RowFormat
    from exflow.runtime.tables import PlacementTables
    from exflow.runtime.wire import Wire


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """The tokens a rank owns.

    Attributes:
        hidden: (T, D) residual stream.
        slots: (T,) the slot of each token's request.
        owned: how many tokens each rank owns; under `home`, none if that is not known.
    """

    hidden: torch.Tensor
    slots: torch.Tensor
    owned: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows a rank runs experts for.

    Attributes:
        hidden: (N, D) residual stream.
        expert_slots: (N, K) the rank's slot of each choice, -1 where another rank runs it.
        weights: (N, K) gate weights, float32.
    """

    hidden: torch.Tensor
    expert_slots: torch.Tensor
    weights: torch.Tensor


class Dispatcher(Protocol):
    """Brings tokens to experts and back."""

    def dispatch(
        self, layer: int, tokens: Tokens, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[Rows, Any]:
        """Send tokens to the ranks of their experts.

        Args:
            layer: index among the MoE layers.
            tokens: the tokens this rank owns.
            expert_ids_TK: their experts, by falling gate weight.
            weights_TK: the gate weights.

        Returns:
            The rows to run experts for, and a record for `combine`.
        """

    def residual(self, record: Any) -> torch.Tensor:
        """(T, D) the residual stream of the tokens that `combine` will return, in their order."""

    def combine(self, partial_ND: torch.Tensor, record: Any) -> Tokens:
        """Add the experts' gate-weighted sums to the tokens and say who owns them now."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalDispatcher:
    """One rank: the specification. Rows are the tokens themselves."""

    tables: PlacementTables

    def dispatch(
        self, layer: int, tokens: Tokens, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[Rows, Tokens]:
        """The tokens as rows."""
        slots_NK = self.tables.slot_of_choice[layer].take(expert_ids_TK)
        rows = Rows(hidden=tokens.hidden, expert_slots=slots_NK, weights=weights_TK)
        return rows, tokens

    def residual(self, record: Tokens) -> torch.Tensor:
        """The tokens stay."""
        return record.hidden

    def combine(self, partial_ND: torch.Tensor, record: Tokens) -> Tokens:
        """Residual plus experts."""
        return Tokens(hidden=record.hidden + partial_ND, slots=record.slots, owned=record.owned)


@dataclass(frozen=True, kw_only=True, eq=False)
class HomeRecord:
    """What `HomeDispatcher.combine` needs: where each row came from and goes back to."""

    layer: int
    tokens: Tokens
    token_M: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class HomeDispatcher:
    """Owners never change: rows go out in one message, partial sums come back in another."""

    tables: PlacementTables
    format: RowFormat
    wire: Wire

    def dispatch(
        self, layer: int, tokens: Tokens, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[Rows, HomeRecord]:
        """Send each token once to every rank that runs some of its experts."""
        tables, row_format = self.tables, self.format
        departure = depart(tables, tables.flat_place, layer, expert_ids_TK, owners_move=False)
        arrival = self.wire.send_rows(
            row_format.pack(tokens.hidden, departure.choices_TK, weights_TK),
            departure,
            at_most=tokens.owned or None,
            layer=layer,
            payload_bytes=row_format.payload_bytes,
        )
        record = HomeRecord(
            layer=layer,
            tokens=tokens,
            token_M=departure.token_M,
            send_counts=arrival.sent_counts,
            receive_counts=arrival.received_counts,
        )
        metadata = row_format.metadata(arrival.rows_NB)
        return rows_of(row_format, tables, layer, arrival.rows_NB, metadata), record

    def residual(self, record: HomeRecord) -> torch.Tensor:
        """The tokens stay."""
        return record.tokens.hidden

    def combine(self, partial_ND: torch.Tensor, record: HomeRecord) -> Tokens:
        """Partial sums return the way the rows came; the owner adds them by rank."""
        returned_MD = exchange_partials(
            self.wire, partial_ND, record.receive_counts, record.send_counts, record.layer
        )
        tokens = record.tokens
        total_TD = torch.zeros_like(tokens.hidden).index_add_(0, record.token_M, returned_MD)
        return Tokens(hidden=tokens.hidden + total_TD, slots=tokens.slots, owned=tokens.owned)


@dataclass(frozen=True, kw_only=True, eq=False)
class CoherentRecord:
    """What `combine` needs where owners move: the rows, and who runs and will own each."""

    layer: int
    hidden_ND: torch.Tensor
    slots_N: torch.Tensor
    next_owner_N: torch.Tensor
    ranks_NK: torch.Tensor
    owned: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CoherentDispatcher:
    """The owner moves, inside its coherence domain, to the rank that runs most of the experts."""

    tables: PlacementTables
    format: RowFormat
    wire: Wire
    num_domains: int

    @property
    def has_combine(self) -> bool:
        """Whether partial sums travel: not with one expert a token and one domain."""
        return self.tables.top_k > 1 or self.num_domains > 1

    def dispatch(
        self, layer: int, tokens: Tokens, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[Rows, CoherentRecord]:
        """Send each token, with its residual, to every rank that runs some of its experts.

        A token whose owner stays without running any of its experts (none is in its domain) is
        kept as a row without experts.
        """
        tables, row_format = self.tables, self.format
        departure = depart(tables, tables.flat_place, layer, expert_ids_TK, owners_move=True)
        assert departure.next_T is not None
        arrival = self.wire.send_rows(
            row_format.pack(
                tokens.hidden, departure.choices_TK, weights_TK, tokens.slots, departure.next_T
            ),
            departure,
            at_most=tokens.owned,
            layer=layer,
            payload_bytes=row_format.payload_bytes,
        )
        return coherent_rows(
            row_format, tables, layer, arrival.rows_NB, owned=tuple(arrival.totals)
        )

    def residual(self, record: CoherentRecord) -> torch.Tensor:
        """Of the rows that came, those whose tokens stay here."""
        if not self.has_combine:
            return record.hidden_ND
        return record.hidden_ND.index_select(
            0, (record.next_owner_N == self.tables.rank).nonzero()[:, 0]
        )

    def combine(self, partial_ND: torch.Tensor, record: CoherentRecord) -> Tokens:
        """Partial sums go to the next owners, who got the residual with the row.

        All ranks lay rows out by (old owner, token), so no metadata travels here.
        """
        if not self.has_combine:
            hidden_TD = record.hidden_ND + partial_ND
            return Tokens(hidden=hidden_TD, slots=record.slots_N, owned=record.owned)
        place = self.tables.flat_place
        sums = find_sums(record.ranks_NK, record.next_owner_N, place)
        return collect_sums(self.wire, partial_ND, record, sums)


def collect_sums(
    wire: Wire, partial_ND: torch.Tensor, record: CoherentRecord, sums: Sums
) -> Tokens:
    """Partial sums go to the next owners, which add them to the tokens that stay with them."""
    returned_MD = exchange_partials(
        wire,
        partial_ND.index_select(0, sums.sent_M),
        sums.sent_counts,
        sums.received_counts,
        record.layer,
    )
    hidden_TD = record.hidden_ND.index_select(0, sums.mine_T)
    total_TD = torch.zeros_like(hidden_TD).index_add_(0, sums.token_M, returned_MD)
    return Tokens(
        hidden=hidden_TD + total_TD,
        slots=record.slots_N.index_select(0, sums.mine_T),
        owned=record.owned,
    )


def coherent_rows(
    row_format: RowFormat,
    tables: PlacementTables,
    layer: int,
    rows_NB: torch.Tensor,
    *,
    owned: tuple[int, ...],
) -> tuple[Rows, CoherentRecord]:
    """Rows as experts take them, and what `combine` needs of them."""
    metadata = row_format.metadata(rows_NB)
    rows = rows_of(row_format, tables, layer, rows_NB, metadata)
    slots_N, next_owner_N = metadata.owners
    record = CoherentRecord(
        layer=layer,
        hidden_ND=rows.hidden,
        slots_N=slots_N,
        next_owner_N=next_owner_N,
        ranks_NK=metadata.choices // tables.num_experts,
        owned=owned,
    )
    return rows, record


def rows_of(
    row_format: RowFormat,
    tables: PlacementTables,
    layer: int,
    rows_NB: torch.Tensor,
    metadata: Metadata,
) -> Rows:
    """Rows as experts take them."""
    return Rows(
        hidden=row_format.hidden(rows_NB),
        expert_slots=tables.slot_of_choice[layer].take(metadata.choices),
        weights=metadata.weights,
    )


def exchange_partials(
    wire: Wire,
    partial_MD: torch.Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    layer: int,
    *,
    in_node: bool = False,
) -> torch.Tensor:
    """Partial sums, sorted by destination, for those of all sources, sorted by source."""
    rows_MB = wire.exchange_rows(
        partial_MD.contiguous().view(torch.uint8),
        send_counts,
        receive_counts,
        kind="combine",
        layer=layer,
        payload_bytes=partial_MD.shape[1] * partial_MD.element_size(),
        in_node=in_node,
    )
    return rows_MB.view(partial_MD.dtype)
