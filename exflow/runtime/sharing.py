"""Keys and values go to the coherence domain while later layers compute; new tokens go to all ranks.

A *record* is one cache entry and where it belongs: | address: int32 | keys and values |. Records leave
as soon as there are enough for a message, on a process group of their own. Nobody needs those of a
layer before the next step comes to that layer, and only there it waits for them:

    step 7   layers 0 to 5    then their records are under way
             layers 6 to 11   then theirs, too
    step 8   layer 0          waits for those of layers 0 to 5
             layer 6          waits for those of layers 6 to 11

A step ends with one more message, of what every rank needs and, if they are few, the last records
(less than a sixteenth of a message):

    | slot, token id: int32 pairs | records |

Every rank knows how many tokens each rank owned at every layer, so the sizes need no message. Where
dispatch (of prompts or decode) is hierarchical and a domain spans nodes, records cross to each node
once, and who waited for them fans them out inside. Shape suffixes: T tokens, N records, B bytes of a record, F entry elements.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from placement.rules import relays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.runtime.attention import Written
    from exflow.runtime.collectives import Pending
    from exflow.runtime.kv_cache import KvCache
    from exflow.runtime.metrics import PhaseMetrics
    from exflow.runtime.wire import Wire

Relays: TypeAlias = "list[list[int]]"

TOKEN_BYTES = 8
ADDRESS_BYTES = 4
MESSAGE_BYTES = 1 << 16


def find_relays(domain_of_rank: Sequence[int], node_of_rank: Sequence[int]) -> Relays:
    """Who brings whose records to whom, each crossing to a node once.

    >>> find_relays([0, 0, 0, 0], [0, 0, 1, 1])
    [[0, 1, 2, 2], [0, 1, 3, 3], [0, 0, 2, 3], [1, 1, 2, 3]]
    """
    domains = np.asarray(domain_of_rank)
    in_domain = domains[:, None] == domains
    table: Relays = relays(in_domain, np.arange(len(domains)), np.asarray(node_of_rank)).tolist()
    return table


class Routes:
    """Which ranks get whose records, and from whom."""

    def __init__(self, domain_of_rank: Sequence[int], relays: Relays | None = None) -> None:
        """The routes of a job.

        Args:
            domain_of_rank: coherence domains.
            relays: relays[source][destination], the rank that brings the destination the source's
                records; None where every source does.
        """
        self.num_ranks = len(domain_of_rank)
        self._domains = list(domain_of_rank)
        self._relays = relays
        self.has_domains = len(set(self._domains)) < self.num_ranks
        ranks = range(self.num_ranks)
        self.has_hops = any(self.relayed(relay, to) for relay in ranks for to in ranks)

    def is_direct(self, source: int, destination: int) -> bool:
        """Whether a rank sends its records to another itself."""
        if source == destination or self._domains[source] != self._domains[destination]:
            return False
        return self._relays is None or self._relays[source][destination] == destination

    def relayed(self, relay: int, destination: int) -> list[int]:
        """The ranks whose records a relay passes on to another rank of its node."""
        if self._relays is None or relay == destination:
            return []
        return [
            source
            for source, relays in enumerate(self._relays)
            if relays[destination] == relay
            and source != relay
            and self._domains[source] == self._domains[destination]
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """Records under way.

    Attributes:
        first_layer: the first layer it has records of.
        entries: how many records of each rank.
        pending: the exchange.
        metrics: counts of the phase it belongs to.
    """

    first_layer: int
    entries: list[int]
    pending: Pending
    metrics: PhaseMetrics


class Sharing:
    """What this rank shares and gets, from step to step."""

    def __init__(
        self, wire: Wire, cache: KvCache, routes: Routes, *, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        """Begin with a cache that is the same on all ranks of a domain.

        Args:
            wire: the collectives.
            cache: this rank's cache.
            routes: who gets whose records.
            message_bytes: records leave before the step's end once the ranks have so many bytes of
                them on average.
        """
        self._wire = wire
        self._cache = cache
        self._routes = routes
        self._record_bytes = ADDRESS_BYTES + cache.entries.shape[1] * cache.entries.element_size()
        self._enough = message_bytes * routes.num_ranks
        self._few = self._enough // 16
        self._written: list[Written] = []
        self._unsent = [0] * routes.num_ranks
        self._first_layer: int | None = None
        self._of_this_step: deque[Message] = deque()
        self._of_last_step: deque[Message] = deque()

    def receive(self, layer: int) -> bool:
        """Wait for what the last step wrote in a layer; whether there was anything to wait for.

        Every rank must ask at every layer, in order, whether it owns tokens there or not.
        """
        messages = self._of_last_step
        if not messages or messages[0].first_layer > layer:
            return False
        while messages and messages[0].first_layer <= layer:
            self._receive(messages.popleft())
        return True

    def add(self, layer: int, owned: Sequence[int], written: Written | None) -> None:
        """A layer's keys and values are stored where the tokens are.

        Args:
            layer: the layer.
            owned: how many tokens each rank owns there.
            written: addresses and entries stored here; None if no token is here.
        """
        if not self._routes.has_domains:
            return
        if self._first_layer is None:
            self._first_layer = layer
        self._unsent = [count + more for count, more in zip(self._unsent, owned, strict=True)]
        if written is not None:
            self._written.append(written)
        if sum(self._unsent) * self._record_bytes >= self._enough:
            self._send()

    def finish(
        self, *, slots_T: torch.Tensor, token_ids_T: torch.Tensor, owned: Sequence[int]
    ) -> dict[int, int]:
        """End a step: share the new tokens; the last records leave.

        Args:
            slots_T: slots of the tokens sampled here.
            token_ids_T: the tokens.
            owned: how many tokens each rank sampled.

        Returns:
            The new token of each slot.
        """
        if sum(self._unsent) * self._record_bytes > self._few:
            self._send()
        wire = self._wire
        mine = torch.stack([slots_T, token_ids_T], dim=1).to(torch.int32)
        entries, records = self._take()
        content = torch.cat([mine.flatten().view(torch.uint8), records])
        send_sizes, receive_sizes = self._sizes(entries)
        ranks = range(wire.num_ranks)
        token_sizes = [count * TOKEN_BYTES for count in owned]
        to_sizes = [0 if rank == wire.rank else token_sizes[wire.rank] for rank in ranks]
        from_sizes = [0 if rank == wire.rank else token_sizes[rank] for rank in ranks]
        send_all = [size + more for size, more in zip(to_sizes, send_sizes, strict=True)]
        receive_all = [size + more for size, more in zip(from_sizes, receive_sizes, strict=True)]
        sent = torch.cat([content[:size] for size in send_all])
        received = wire.exchange_bytes(sent, send_all, receive_all)
        wire.metrics.num_bytes["tokens"] += sum(to_sizes)
        wire.metrics.num_bytes["kv_share"] += sum(send_sizes)
        parts = torch.split(received, receive_all)
        tokens = [mine]
        tokens += [
            part[:size].view(torch.int32).view(-1, 2)
            for part, size in zip(parts, from_sizes, strict=True)
        ]
        last = [part[size:] for part, size in zip(parts, from_sizes, strict=True)]
        self._store(last, entries, wire.metrics)
        assert not self._of_last_step
        self._of_last_step, self._of_this_step = self._of_this_step, self._of_last_step
        return dict(torch.cat(tokens).tolist())

    def drain(self) -> None:
        """Wait for all that is under way, between steps; every rank must ask."""
        while self._of_last_step:
            self._receive(self._of_last_step.popleft())

    def _send(self) -> None:
        """The records that have not left leave in the background."""
        assert self._first_layer is not None
        first_layer = self._first_layer
        entries, records = self._take()
        send_sizes, receive_sizes = self._sizes(entries)
        content = torch.cat([records[:size] for size in send_sizes])
        self._wire.metrics.num_bytes["kv_share"] += len(content)
        self._of_this_step.append(
            Message(
                first_layer=first_layer,
                entries=entries,
                pending=self._wire.start_exchange(content, send_sizes, receive_sizes),
                metrics=self._wire.metrics,
            )
        )

    def _receive(self, message: Message) -> None:
        """Wait for records and store them."""
        parts = torch.split(message.pending.wait(), self._sizes(message.entries)[1])
        self._store(parts, message.entries, message.metrics)

    def _take(self) -> tuple[list[int], torch.Tensor]:
        """How many records of each rank have not left, and the bytes of those of this rank."""
        entries, self._unsent = self._unsent, [0] * self._routes.num_ranks
        written, self._written = self._written, []
        self._first_layer = None
        if not written:
            return entries, torch.empty(0, dtype=torch.uint8, device=self._cache.entries.device)
        addresses_N = torch.cat([addresses for addresses, _ in written])
        entries_NF = torch.cat([values for _, values in written])
        addresses_N1 = addresses_N.to(torch.int32)[:, None]
        parts = [addresses_N1.view(torch.uint8), entries_NF.view(torch.uint8)]
        return entries, torch.cat(parts, dim=1).flatten()

    def _sizes(self, entries: Sequence[int]) -> tuple[list[int], list[int]]:
        """Bytes of records to each rank and from each."""
        rank, routes = self._wire.rank, self._routes
        num_bytes = [count * self._record_bytes for count in entries]
        ranks = range(routes.num_ranks)
        return (
            [num_bytes[rank] if routes.is_direct(rank, other) else 0 for other in ranks],
            [num_bytes[other] if routes.is_direct(other, rank) else 0 for other in ranks],
        )

    def _store(
        self, arrived: Sequence[torch.Tensor], entries: Sequence[int], metrics: PhaseMetrics
    ) -> None:
        """Store records, and those that come by way of relays.

        Args:
            arrived: records by source.
            entries: how many each rank sent to those that it sends to.
            metrics: what passing them on is counted in.
        """
        if not any(entries):
            return
        records = list(arrived)
        if self._routes.has_hops:
            records.append(self._pass_on(arrived, entries, metrics))
        records_NB = torch.cat(records).view(-1, self._record_bytes)
        if not len(records_NB):
            return
        addresses_N1 = records_NB[:, :ADDRESS_BYTES].contiguous().view(torch.int32)
        entries_NF = records_NB[:, ADDRESS_BYTES:].contiguous().view(self._cache.entries.dtype)
        self._cache.write(addresses_N1[:, 0].long(), entries_NF)

    def _pass_on(
        self, arrived: Sequence[torch.Tensor], entries: Sequence[int], metrics: PhaseMetrics
    ) -> torch.Tensor:
        """Fan out inside the node what came from others; what this rank gets from relays."""
        wire, routes = self._wire, self._routes
        node = range(wire.first_of_node, wire.first_of_node + wire.ranks_per_node)
        send_sizes = [
            sum(entries[source] for source in routes.relayed(wire.rank, to)) * self._record_bytes
            for to in node
        ]
        receive_sizes = [
            sum(entries[source] for source in routes.relayed(relay, wire.rank)) * self._record_bytes
            for relay in node
        ]
        sent = [arrived[source] for to in node for source in routes.relayed(wire.rank, to)]
        metrics.num_bytes["kv_share"] += sum(send_sizes)
        return wire.exchange_bytes(
            torch.cat([arrived[0][:0], *sent]),
            send_sizes,
            receive_sizes,
            in_node=True,
            metrics=metrics,
        )
