"""Limits: what requests may need, and which can never run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exflow.runtime.kv_cache import PAGE_SIZE, pages_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.requests import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may need.

    Attributes:
        max_positions: positions the model has.
        eos_token_ids: tokens that end a text.
        batch_size: requests in flight, over all ranks.
        num_pages: pages of key-value cache of a coherence domain.
        max_pages: pages that the user grants; None for as many as are needed.
        prefill_chunk: prompt tokens that a rank reads between two decode steps; None for all.
    """

    max_positions: int
    eos_token_ids: tuple[int, ...]
    batch_size: int
    num_pages: int
    max_pages: int | None = None
    prefill_chunk: int | None = None

    @classmethod
    def for_requests(
        cls,
        requests: Sequence[Request],
        definition: DecoderDefinition,
        *,
        batch_size: int,
        max_pages: int | None = None,
        prefill_chunk: int | None = None,
    ) -> Limits:
        """Limits with pages enough for the `batch_size` longest requests, up to `max_pages`.

        There are slots for no more requests than are given.
        """
        max_positions = definition.max_positions
        needs = [_pages(request, max_positions) for request in requests]
        fitting = sorted(need for need in needs if max_pages is None or need <= max_pages)
        wanted = max(1, sum(fitting[-batch_size:]))
        return cls(
            max_positions=max_positions,
            eos_token_ids=definition.eos_token_ids,
            batch_size=min(batch_size, max(1, len(requests))),
            num_pages=wanted if max_pages is None else min(wanted, max_pages),
            max_pages=max_pages,
            prefill_chunk=prefill_chunk,
        )

    def new_tokens(self, request: Request) -> int:
        """Tokens a request may make."""
        return _new_tokens(request, self.max_positions)

    def pages(self, request: Request) -> int:
        """Pages it needs for them and its prompt."""
        return _pages(request, self.max_positions)

    def refusal(self, request: Request) -> str | None:
        """Why a request can never run, or None."""
        length = len(request.token_ids)
        if length == 0:
            return "the prompt has no tokens"
        if length > self.max_positions:
            return f"the prompt has {length} tokens, the model takes {self.max_positions}"
        if self.max_pages is not None and self.pages(request) > self.max_pages:
            return (
                f"needs {self.pages(request)} pages of {PAGE_SIZE} tokens of KV cache for "
                f"{length} prompt tokens and {self.new_tokens(request)} new ones, there are "
                f"{self.max_pages}; grant more KV memory or ask for fewer tokens"
            )
        return None


def _new_tokens(request: Request, max_positions: int) -> int:
    return min(request.params.max_tokens, max_positions - len(request.token_ids) + 1)


def _pages(request: Request, max_positions: int) -> int:
    """Pages for a whole request; none for one that the model cannot take."""
    if len(request.token_ids) > max_positions:
        return 0
    return pages_for(len(request.token_ids) + _new_tokens(request, max_positions))
