"""Agreement: ranks that were given different things would hang, or compute what fits nothing."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from exflow.runtime.ranks import Ranks


class AgreementError(UserError):
    """The ranks of a job were given different things."""


def check_same(given: Mapping[str, Any], ranks: Ranks, device: torch.device) -> None:
    """Refuse a job whose ranks were given different things; all ranks ask.

    Args:
        given: what this rank was given, by what the user calls it; values are told apart by `repr`.
        ranks: this rank.
        device: where it computes.

    Raises:
        AgreementError: on every rank, saying what differs from rank 0 and where.
    """
    mine = {name: digest_of([value]) for name, value in given.items()}
    first, *others = ranks.gather(mine, device)
    unlike = {
        rank: [name for name in first | other if other.get(name) != first.get(name)]
        for rank, other in enumerate(others, start=1)
        if other != first
    }
    if unlike:
        told = "; ".join(
            f"rank {rank} was not given the same {', '.join(names)} as rank 0"
            for rank, names in unlike.items()
        )
        msg = f"{told}; start all ranks with the same arguments and files"
        raise AgreementError(msg)


def digest_of(values: Iterable[Any]) -> str:
    """A digest of many values, told apart by `repr`."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode() + b"\n")
    return digest.hexdigest()
