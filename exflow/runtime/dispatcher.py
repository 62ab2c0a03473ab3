"""Dispatchers: bring tokens to the ranks of their experts, and the partial sums to their owners.

    owner 0 -- row --> rank 2 runs experts -- partial sum --> owner 0

That is `home`; in `coherent.py` owners move, and in `hierarchical.py` rows cross to a node once.
`dispatch` returns rows and a frozen record, `combine` takes that record; nothing is remembered in
between. A rank that runs several of a token's experts gets its row once. The numbers of rows are
`placement.traffic.count_traffic`'s.

Messages a MoE layer: the rows with their number, and the partial sums. On GPUs the numbers go
before, in a message of their own.

Shape suffixes: T tokens owned, N rows received, M places in a buffer, K choices, D hidden size,
B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from exflow.runtime.hops import depart

if TYPE_CHECKING:
    from exflow.runtime.hops import Departure
    from exflow.runtime.rows import Metadata, RowFormat
    from exflow.runtime.tables import Place, PlacementTables
    from exflow.runtime.wire import Arrival, Wire


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
        departure, arrival = send_tokens(
            row_format,
            tables,
            self.wire,
            tables.flat_place,
            layer,
            tokens,
            expert_ids_TK,
            weights_TK,
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


def send_tokens(
    row_format: RowFormat,
    tables: PlacementTables,
    wire: Wire,
    place: Place,
    layer: int,
    tokens: Tokens,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> tuple[Departure, Arrival]:
    """The first hop of the tokens of every rank; owners move if their rows say where to."""
    departure = depart(tables, place, layer, expert_ids_TK, owners_move=row_format.has_owner)
    owners = () if departure.next_T is None else (tokens.slots, departure.next_T)
    arrival = wire.send_rows(
        row_format.pack(tokens.hidden, departure.choices_TK, weights_TK, *owners),
        departure,
        at_most=tokens.owned or None,
        layer=layer,
        payload_bytes=row_format.payload_bytes,
    )
    return departure, arrival


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
