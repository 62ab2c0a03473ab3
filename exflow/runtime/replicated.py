"""Replicated dispatch, for steps of few tokens: every rank has them all, only partial sums travel.

    rank 0 has all tokens -- partial sums --> every other rank
    rank 1 has all tokens -- partial sums --> every other rank

Where keys and values of all requests are on all ranks, each can attend and route for every token as
well as the owner. Then no token has to travel and no keys and values are shared: one message a MoE
layer, and nobody has to be told its size. What it costs is that attention is computed on every rank,
and W (W - 1) rows a token and layer, whatever the placement. All ranks have to route alike; should
two disagree (CPUs of different make might, in a tie), sums are a little off, and nothing hangs.

Shape suffixes: T tokens of all ranks, K choices, D hidden size, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.runtime.dispatcher import Rows, Tokens

if TYPE_CHECKING:
    from exflow.runtime.tables import PlacementTables
    from exflow.runtime.wire import Wire


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplicatedRecord:
    """What `ReplicatedDispatcher.combine` needs."""

    layer: int
    tokens: Tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplicatedDispatcher:
    """Every rank has the tokens of all, those of rank 0 first; `owned` is how many started where."""

    tables: PlacementTables
    wire: Wire

    def dispatch(
        self, layer: int, tokens: Tokens, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[Rows, ReplicatedRecord]:
        """The tokens as rows; of copies, those run that would if tokens were at home."""
        tables = self.tables
        home_T = None
        if tables.has_copies[layer]:
            home_T = homes_of(tokens.owned, expert_ids_TK.device)
        choices_TK = tables.choose(layer, expert_ids_TK, home_T)
        slots_TK = tables.slot_of_choice[layer].take(choices_TK)
        rows = Rows(hidden=tokens.hidden, expert_slots=slots_TK, weights=weights_TK)
        return rows, ReplicatedRecord(layer=layer, tokens=tokens)

    def residual(self, record: ReplicatedRecord) -> torch.Tensor:
        """The tokens stay."""
        return record.tokens.hidden

    def combine(self, partial_TD: torch.Tensor, record: ReplicatedRecord) -> Tokens:
        """Every rank adds the sums of all, in the order of ranks, so that all come to the same."""
        tokens = record.tokens
        sent = partial_TD.contiguous().view(torch.uint8)
        sums_WTB = self.wire.share_rows(sent, kind="combine", layer=record.layer)
        total_TD = torch.zeros_like(tokens.hidden)
        for sums_TD in sums_WTB.view(partial_TD.dtype):
            total_TD += sums_TD
        return Tokens(hidden=tokens.hidden + total_TD, slots=tokens.slots, owned=tokens.owned)


def homes_of(owned: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(T,) the rank that each token started on, made without the host: it is part of recorded steps.

    >>> homes_of((2, 0, 1), torch.device("cpu"))
    tensor([0, 0, 2])
    """
    parts = [
        torch.full((count,), rank, dtype=torch.int64, device=device)
        for rank, count in enumerate(owned)
    ]
    return torch.cat(parts)


def own_tokens(tokens: Tokens, rank: int) -> Tokens:
    """Of tokens that every rank has, those that started on one."""
    start = sum(tokens.owned[:rank])
    own = slice(start, start + tokens.owned[rank])
    return Tokens(hidden=tokens.hidden[own], slots=tokens.slots[own], owned=tokens.owned)
