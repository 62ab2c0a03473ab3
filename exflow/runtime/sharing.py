"""The end of a step: new tokens go to all ranks, new keys and values to the coherence domain.

One all-to-all. What rank s sends to rank w:

    | slot, token id: int32 pairs | addresses: int64 | keys and values |

the last two only inside the domain. Every rank knows how many tokens each rank owned at every
layer, so the sizes need no message. Shape suffixes: T tokens, N cache entries, F entry elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.runtime.kv_cache import KvCache
    from exflow.runtime.wire import Wire

TOKEN_BYTES = 8
ADDRESS_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much each rank shares.

    Attributes:
        tokens: new tokens of each rank.
        entries: keys and values each rank has stored.
        entry_bytes: bytes of one.
        domain_of_rank: coherence domains.
    """

    tokens: Sequence[int]
    entries: Sequence[int]
    entry_bytes: int
    domain_of_rank: Sequence[int]

    def between(self, source: int, destination: int) -> int:
        """Bytes from one rank to another; none to itself."""
        if source == destination:
            return 0
        tokens = self.tokens[source] * TOKEN_BYTES
        if self.domain_of_rank[source] != self.domain_of_rank[destination]:
            return tokens
        return tokens + self.entries[source] * (ADDRESS_BYTES + self.entry_bytes)


def share(
    wire: Wire,
    cache: KvCache,
    sizes: Sizes,
    *,
    slots_T: torch.Tensor,
    token_ids_T: torch.Tensor,
    written: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> dict[int, int]:
    """Share a step's tokens and cache entries; store those of the domain's other ranks.

    Args:
        wire: the collectives.
        cache: this rank's cache.
        sizes: how much each rank shares.
        slots_T: slots of the tokens sampled here.
        token_ids_T: the tokens.
        written: (addresses, entries) stored here during the step.

    Returns:
        The new token of each slot.
    """
    tokens = torch.stack([slots_T, token_ids_T], dim=1).to(torch.int32)
    ranks = range(wire.num_ranks)
    send_sizes = [sizes.between(wire.rank, rank) for rank in ranks]
    receive_sizes = [sizes.between(rank, wire.rank) for rank in ranks]
    content = _pack(tokens, written)
    sent = torch.cat([content[:size] for size in send_sizes])
    received = wire.exchange_bytes(sent, send_sizes, receive_sizes)
    num_token_bytes = sum(sizes.tokens[wire.rank] * TOKEN_BYTES for size in send_sizes if size)
    wire.metrics.num_bytes["tokens"] += num_token_bytes
    wire.metrics.num_bytes["kv_share"] += sum(send_sizes) - num_token_bytes
    pairs = [tokens]
    for rank, part in enumerate(torch.split(received, receive_sizes)):
        num_tokens = sizes.tokens[rank] * TOKEN_BYTES
        pairs.append(part[:num_tokens].view(torch.int32).view(-1, 2))
        if len(part) > num_tokens:
            _store(cache, part[num_tokens:], sizes.entries[rank])
    return dict(torch.cat(pairs).tolist())


def _pack(
    tokens_T2: torch.Tensor, written: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    parts = [tokens_T2.flatten().view(torch.uint8)]
    parts += [addresses.view(torch.uint8) for addresses, _ in written]
    parts += [entries.flatten().view(torch.uint8) for _, entries in written]
    return torch.cat(parts)


def _store(cache: KvCache, content: torch.Tensor, num_entries: int) -> None:
    content = content.clone()  # int64 addresses need alignment
    addresses_N = content[: num_entries * ADDRESS_BYTES].view(torch.int64)
    entries = content[num_entries * ADDRESS_BYTES :].view(cache.entries.dtype)
    cache.write(addresses_N, entries.view(num_entries, -1))
