"""The end of a step: new tokens go to all ranks, new keys and values to the coherence domain.

One all-to-all. What rank s sends to rank w:

    | slot, token id: int32 pairs | addresses: int64 | keys and values |

the last two only inside the domain. Every rank knows how many tokens each rank owned at every
layer, so the sizes need no message. Where dispatch is hierarchical and a domain spans nodes, keys and
values cross to each node once, and a second exchange fans them out inside. Shape suffixes: T tokens, N cache entries, F entry elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from placement.traffic import relays

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from exflow.runtime.kv_cache import KvCache
    from exflow.runtime.wire import Wire

Relays: TypeAlias = "list[list[int]]"

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
        relays: relays[source][destination], the rank that brings the destination the source's
            keys and values; None where the source does.
    """

    tokens: Sequence[int]
    entries: Sequence[int]
    entry_bytes: int
    domain_of_rank: Sequence[int]
    relays: Relays | None = None

    def between(self, source: int, destination: int) -> int:
        """Bytes from one rank to another; none to itself."""
        if source == destination:
            return 0
        tokens = self.tokens[source] * TOKEN_BYTES
        if self.domain_of_rank[source] != self.domain_of_rank[destination]:
            return tokens
        if self.relays is not None and self.relays[source][destination] != destination:
            return tokens
        return tokens + self.shared_by(source)

    def shared_by(self, rank: int) -> int:
        """Bytes of the keys and values a rank has stored, with their addresses."""
        return self.entries[rank] * (ADDRESS_BYTES + self.entry_bytes)

    def relayed(self, relay: int, destination: int) -> list[int]:
        """The ranks whose keys and values a relay passes on to another rank of its node."""
        if self.relays is None or relay == destination:
            return []
        return [
            source
            for source, relays in enumerate(self.relays)
            if relays[destination] == relay
            and source != relay
            and self.domain_of_rank[source] == self.domain_of_rank[destination]
        ]


def find_relays(domain_of_rank: Sequence[int], node_of_rank: Sequence[int]) -> Relays | None:
    """Who brings whose keys and values to whom, each crossing to a node once.

    None if nobody has anything to pass on.

    >>> find_relays([0, 0, 0, 0], [0, 0, 1, 1])
    [[0, 1, 2, 2], [0, 1, 3, 3], [0, 0, 2, 3], [1, 1, 2, 3]]
    >>> find_relays([0, 0, 1, 1], [0, 0, 1, 1])
    """
    domains = np.asarray(domain_of_rank)
    in_domain = domains[:, None] == domains
    found = relays(in_domain, np.arange(len(domains)), np.asarray(node_of_rank))
    is_passed = in_domain & (found != np.arange(len(domains)))
    table: Relays = found.tolist()
    return table if is_passed.any() else None


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
    stored: dict[int, torch.Tensor] = {}
    for rank, part in enumerate(torch.split(received, receive_sizes)):
        num_tokens = sizes.tokens[rank] * TOKEN_BYTES
        pairs.append(part[:num_tokens].view(torch.int32).view(-1, 2))
        if len(part) > num_tokens:
            stored[rank] = part[num_tokens:]
    if sizes.relays is not None:
        stored |= _pass_on(wire, sizes, stored, content)
    for rank, part in stored.items():
        _store(cache, part, sizes.entries[rank])
    return dict(torch.cat(pairs).tolist())


def _pass_on(
    wire: Wire, sizes: Sizes, stored: Mapping[int, torch.Tensor], like: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Fan out inside the node what came from others; what this rank gets, by source."""
    node = range(wire.first_of_node, wire.first_of_node + wire.ranks_per_node)
    empty = like[:0]
    sent = [[stored.get(source, empty) for source in sizes.relayed(wire.rank, to)] for to in node]
    sources = [source for relay in node for source in sizes.relayed(relay, wire.rank)]
    receive_sizes = [
        sum(sizes.shared_by(source) for source in sizes.relayed(relay, wire.rank)) for relay in node
    ]
    send_sizes = [sum(map(len, parts)) for parts in sent]
    content = torch.cat([empty, *(part for parts in sent for part in parts)])
    received = wire.exchange_bytes(content, send_sizes, receive_sizes, in_node=True)
    wire.metrics.num_bytes["kv_share"] += sum(send_sizes)
    parts = torch.split(received, [sizes.shared_by(source) for source in sources])
    return {source: part for source, part in zip(sources, parts, strict=True) if len(part)}


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
