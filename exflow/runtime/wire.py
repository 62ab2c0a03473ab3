"""The messages of a forward pass, counted by kind.

Shape suffixes: T tokens owned, N rows, B bytes of a row, Y words of a row, W ranks, X numbers of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from exflow.runtime.collectives import all_to_all, exchange_parts, needs_splits, start_all_to_all
from exflow.runtime.cpu_rows import read_messages, write_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.distributed as dist

    from exflow.runtime.collectives import Pending
    from exflow.runtime.hops import Departure
    from exflow.runtime.metrics import PhaseMetrics, RowKind
    from exflow.runtime.ranks import Ranks

COUNT_BYTES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """What came from other ranks.

    Attributes:
        rows_NB: uint8 rows, sorted by source.
        sent_counts: rows that went to each rank.
        received_counts: rows that came from each rank.
        totals: the other numbers of the heads, added over the ranks.
    """

    rows_NB: torch.Tensor
    sent_counts: list[int]
    received_counts: list[int]
    totals: list[int]


class Wire:
    """Messages between the ranks.

    Attributes:
        metrics: where rows, bytes and messages are counted; changed from phase to phase.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        metrics: PhaseMetrics,
        *,
        num_nodes: int = 1,
        has_background: bool = False,
    ) -> None:
        """The wire of one rank.

        Args:
            ranks: this rank.
            device: where this rank computes.
            metrics: where rows, bytes and messages are counted.
            num_nodes: nodes, if something is sent inside nodes only.
            has_background: whether something is sent beside the rest.
        """
        self.rank = ranks.rank
        self.num_ranks = ranks.num_ranks
        self.ranks_per_node = ranks.num_ranks // num_nodes
        self.first_of_node = self.rank - self.rank % self.ranks_per_node
        self.device = device
        self.metrics = metrics
        self._ranks = ranks
        self._has_background = has_background
        self._node_group: dist.ProcessGroup | None = None
        self._background: dist.ProcessGroup | None = None

    def connect(self) -> None:
        """Make the process groups beside the first, once all ranks are ready; all must ask.

        Raises:
            ContactLostError: another rank has died, or has not come in time.
        """
        if self.ranks_per_node < self.num_ranks and self._node_group is None:
            self._node_group = self._ranks.node_group(self.num_ranks // self.ranks_per_node)
        if self._has_background and self._background is None:
            self._background = self._ranks.second_group()

    def exchange_rows(
        self,
        rows_NB: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        *,
        kind: RowKind,
        layer: int,
        payload_bytes: int,
        in_node: bool = False,
    ) -> torch.Tensor:
        """Send rows, sorted by destination, and get those of all sources, sorted by source.

        Args:
            rows_NB: uint8 rows.
            send_counts: rows for each rank, this one too.
            receive_counts: rows from each rank.
            kind: what they are counted as.
            layer: index among the MoE layers.
            payload_bytes: bytes of a row that are hidden state; the rest is metadata.
            in_node: only with the ranks of this node; the counts are theirs.
        """
        first = self.first_of_node if in_node else 0
        group = self._node_group if in_node else None
        width = rows_NB.shape[1]
        received = rows_NB.new_empty((sum(receive_counts), width))
        all_to_all(
            received,
            rows_NB,
            list(receive_counts),
            list(send_counts),
            place=self.rank - first,
            group=group,
        )
        self._count_rows(kind, layer, send_counts, width, payload_bytes, first=first)
        return received

    def share_rows(self, rows_NB: torch.Tensor, *, kind: RowKind, layer: int) -> torch.Tensor:
        """(W, N, B) the uint8 rows of every rank, by rank; all have as many."""
        sent = rows_NB.repeat(self.num_ranks, 1)
        received = torch.empty_like(sent)
        all_to_all(received, sent, place=self.rank)
        row_counts = self.metrics.rows[kind][layer]
        row_counts += len(rows_NB)
        row_counts[self.rank] -= len(rows_NB)
        self.metrics.messages[kind] += 1
        self.metrics.num_bytes["payload"] += (self.num_ranks - 1) * rows_NB.numel()
        return received.view(self.num_ranks, *rows_NB.shape)

    def send_rows(
        self,
        rows_TB: torch.Tensor,
        departure: Departure,
        *,
        at_most: Sequence[int] | None,
        layer: int,
        payload_bytes: int,
    ) -> Arrival:
        """Dispatch rows to ranks that do not know how many will come, and numbers with them.

        On a CPU it is one message, `| head: int32 | rows |`. On a GPU, where both sides must know
        its size, or if nobody knows what to expect, heads go before.

        Args:
            rows_TB: uint8 rows of the tokens.
            departure: which of them go to each rank, and what it is told.
            at_most: rows that each rank may send to another, if that is known.
            layer: index among the MoE layers.
            payload_bytes: bytes of a row that are hidden state; the rest is metadata.
        """
        heads_WX = departure.heads_WX
        self.metrics.num_bytes["counts"] += (self.num_ranks - 1) * heads_WX.shape[1] * COUNT_BYTES
        if at_most is None or needs_splits(self.device):
            told, heard = self._exchange_heads(heads_WX)
            sent = [head[0] for head in told]
            received = [head[0] for head in heard]
            rows_NB = rows_TB.new_empty((sum(received), rows_TB.shape[1]))
            sent_MB = rows_TB.index_select(0, departure.token_M)
            all_to_all(rows_NB, sent_MB, received, sent, place=self.rank)
        else:
            sent = heads_WX[:, 0].tolist()
            assert max(sent) <= at_most[self.rank]
            rows_NB, heard = self._send_together(rows_TB, departure, at_most)
            received = [head[0] for head in heard]
        self._count_rows("dispatch", layer, sent, rows_TB.shape[1], payload_bytes)
        return Arrival(
            rows_NB=rows_NB,
            sent_counts=sent,
            received_counts=received,
            totals=[sum(numbers) for numbers in zip(*heard, strict=True)][1:],
        )

    def _send_together(
        self, rows_TB: torch.Tensor, departure: Departure, at_most: Sequence[int]
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Heads and rows in one message: what comes."""
        rows_TY, heads_WX = rows_TB.view(torch.int32).numpy(), departure.heads_WX.numpy()
        num_numbers, width = heads_WX.shape[1], rows_TY.shape[1]
        words, sizes = write_messages(rows_TY, departure.token_M.numpy(), heads_WX)
        sent = torch.split(torch.from_numpy(words), sizes.tolist())
        room = [num_numbers + count * width for count in at_most]
        room[self.rank] = 0
        received = torch.empty(sum(room), dtype=torch.int32)
        exchange_parts(sent, torch.split(received, room), self.rank)
        rows_NY, heard_WX = read_messages(
            received.numpy(),
            np.array(room),
            sent[self.rank].numpy(),
            self.rank,
            num_numbers,
            width,
        )
        return torch.from_numpy(rows_NY).view(torch.uint8), heard_WX.tolist()

    def _exchange_heads(self, heads_WX: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """What this rank says to each, and what each says to it."""
        received = torch.empty_like(heads_WX)
        all_to_all(received, heads_WX.contiguous(), place=self.rank)
        self.metrics.messages["counts"] += 1
        told, heard = torch.stack([heads_WX, received]).tolist()
        return told, heard

    def exchange_bytes(
        self,
        content: torch.Tensor,
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        *,
        in_node: bool = False,
        metrics: PhaseMetrics | None = None,
    ) -> torch.Tensor:
        """Bytes of any meaning, sorted by destination; the caller counts them by kind.

        Args:
            content: what is sent.
            send_sizes: bytes for each rank.
            receive_sizes: bytes from each rank.
            in_node: only with the ranks of this node; the sizes are theirs.
            metrics: where the message is counted, if not in the phase under way.
        """
        received = content.new_empty(sum(receive_sizes))
        group = self._node_group if in_node else None
        place = self.rank - (self.first_of_node if in_node else 0)
        sizes = list(receive_sizes), list(send_sizes)
        all_to_all(received, content, *sizes, place=place, group=group)
        (metrics or self.metrics).messages["share"] += 1
        return received

    def start_exchange(
        self, content: torch.Tensor, send_sizes: list[int], receive_sizes: list[int]
    ) -> Pending:
        """`exchange_bytes` beside the rest of the step, on a wire with a background."""
        assert self._background is not None
        received = content.new_empty(sum(receive_sizes))
        self.metrics.messages["share"] += 1
        return start_all_to_all(
            received, content, receive_sizes, send_sizes, group=self._background
        )

    def _count_rows(
        self,
        kind: RowKind,
        layer: int,
        send_counts: Sequence[int],
        width: int,
        payload_bytes: int,
        *,
        first: int = 0,
    ) -> None:
        """Count a message of rows; `send_counts` are for the ranks from `first` on."""
        metrics = self.metrics
        kept = send_counts[self.rank - first]
        row_counts = metrics.rows[kind][layer]
        row_counts[first : first + len(send_counts)] += send_counts
        row_counts[self.rank] -= kept
        remote = sum(send_counts) - kept
        metrics.messages[kind] += 1
        metrics.num_bytes["payload"] += remote * payload_bytes
        metrics.num_bytes["metadata"] += remote * (width - payload_bytes)
