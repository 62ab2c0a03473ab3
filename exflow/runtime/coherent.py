"""The coherent dispatcher: owners move to where their tokens' experts are.

    owner 0 -- row --> rank 2 runs most experts, adds the sums of the others and its own to the
                       residual it got with the row, and is the next owner

Partial sums are not sent where every token has one expert and may be owned by any rank. Their
numbers need no message: a row says who runs the token's experts and who owns it next.

Shape suffixes: T tokens owned, N rows received, M places in a buffer, K choices, D hidden size,
B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.runtime.dispatcher import Tokens, exchange_partials, rows_of, send_tokens
from exflow.runtime.hops import find_sums

if TYPE_CHECKING:
    from exflow.runtime.dispatcher import Rows
    from exflow.runtime.hops import Sums
    from exflow.runtime.rows import RowFormat
    from exflow.runtime.tables import PlacementTables
    from exflow.runtime.wire import Wire


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
        _, arrival = send_tokens(
            row_format,
            tables,
            self.wire,
            tables.flat_place,
            layer,
            tokens,
            expert_ids_TK,
            weights_TK,
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
        partial_ND.index_select(0, sums.sent.rows_M),
        sums.sent.counts,
        sums.received.counts,
        record.layer,
    )
    hidden_TD = record.hidden_ND.index_select(0, sums.mine_T)
    total_TD = torch.zeros_like(hidden_TD).index_add_(0, sums.received.rows_M, returned_MD)
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
