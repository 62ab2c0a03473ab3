"""The collectives: who sends what to whom is settled by those who call them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from exflow.runtime.errors import ContactLostError

if TYPE_CHECKING:
    from collections.abc import Sequence


# Of messages; a message of one kind is never taken for one of the other.
PARTS_TAG, SWAP_TAG = 0, 1


def all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    receive_sizes: list[int] | None = None,
    send_sizes: list[int] | None = None,
    *,
    place: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """`torch.distributed.all_to_all_single`.

    On CPUs two ranks that know the sizes send to each other instead: gloo's all-to-all passes
    through two more threads and takes twice as long.

    Args:
        received: where to write, by source.
        sent: by destination.
        receive_sizes: rows from each rank; None: as many from each.
        send_sizes: rows for each rank; None: as many for each.
        place: this rank's place in the group.
        group: None for all ranks.

    Raises:
        ContactLostError: another rank has died, or has not answered in time.
    """
    try:
        if received.is_cpu and receive_sizes and send_sizes and len(send_sizes) == 2:
            pair = group or dist.group.WORLD
            assert pair is not None
            parts = torch.split(received, receive_sizes), torch.split(sent, send_sizes)
            _swap(*parts, place=place, pair=pair)
        else:
            dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group)
    except RuntimeError as error:
        raise lost(error) from error


def _swap(
    received: Sequence[torch.Tensor],
    sent: Sequence[torch.Tensor],
    *,
    place: int,
    pair: dist.ProcessGroup,
) -> None:
    """What the other of two ranks sends; nothing where there is nothing."""
    other = 1 - place
    under_way = []
    if len(received[other]):
        under_way.append(pair.recv([received[other]], other, SWAP_TAG))
    if len(sent[other]):
        under_way.append(pair.send([sent[other]], other, SWAP_TAG))
    received[place].copy_(sent[place])
    for work in under_way:
        work.wait()


@dataclass(frozen=True, eq=False)
class Pending:
    """An all-to-all under way; what is sent must live until it has arrived."""

    received: torch.Tensor
    sent: torch.Tensor
    work: dist.Work

    def wait(self) -> torch.Tensor:
        """What was received.

        Raises:
            ContactLostError: another rank has died, or has not answered in time.
        """
        try:
            self.work.wait()
        except RuntimeError as error:
            raise lost(error) from error
        return self.received


def needs_splits(device: torch.device) -> bool:
    """Whether both sides of an exchange must know its sizes; `exchange_parts` is for the others."""
    return device.type != "cpu" or not sys.platform.startswith("linux")


def exchange_parts(
    sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor], rank: int
) -> None:
    """Messages from rank to rank whose receivers do not know how long they are; gloo over TCP only.

    There a receive may be longer than what arrives, not shorter; with NCCL, and over gloo's other
    transports, both must be the same.

    Args:
        sent: by destination; what is for this rank is not sent.
        received: by source: room for the longest there may be, of which the beginning is filled.
        rank: this rank.

    Raises:
        ContactLostError: another rank has died, or has not answered in time.
    """
    group = dist.group.WORLD
    assert group is not None
    num_ranks = len(sent)
    others = [(rank + step) % num_ranks for step in range(1, num_ranks)]
    try:
        # The group's own methods: `dist.isend` and `irecv` take three times as long to begin.
        under_way = [group.recv([received[other]], other, PARTS_TAG) for other in reversed(others)]
        under_way += [group.send([sent[other]], other, PARTS_TAG) for other in others]
        for work in under_way:
            work.wait()
    except RuntimeError as error:
        raise lost(error) from error


def start_all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    receive_sizes: list[int],
    send_sizes: list[int],
    *,
    group: dist.ProcessGroup,
) -> Pending:
    """`all_to_all` that goes on while this rank does other things."""
    try:
        work = dist.all_to_all_single(
            received, sent, receive_sizes, send_sizes, group=group, async_op=True
        )
    except RuntimeError as error:
        raise lost(error) from error
    return Pending(received, sent, work)


def lost(error: RuntimeError) -> ContactLostError:
    """What a failed collective means."""
    return ContactLostError(f"lost contact with another rank: {error}")
