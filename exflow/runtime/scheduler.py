"""Scheduler: which requests are in flight. Every rank runs it and comes to the same result.

A request joins, in order, when a slot and pages for its whole length are free, and leaves when it
finishes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exflow.runtime.kv_cache import PagePool, pages_for
from exflow.runtime.requests import Completion, FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from exflow.models.definition import DecoderDefinition


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may need.

    Attributes:
        max_new_tokens: tokens after which a request ends.
        max_positions: positions the model has.
        eos_token_ids: tokens that end a text.
        batch_size: requests in flight, over all ranks.
        num_pages: pages of key-value cache of a coherence domain.
    """

    max_new_tokens: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    batch_size: int
    num_pages: int

    @classmethod
    def for_requests(
        cls,
        requests: Iterable[Request],
        definition: DecoderDefinition,
        *,
        params: SamplingParams,
        batch_size: int,
    ) -> Limits:
        """Limits with pages enough for the `batch_size` longest requests in one domain."""
        max_positions = definition.max_positions
        needs = sorted(
            pages_for(
                len(request.token_ids) + _new_tokens(request, params.max_new_tokens, max_positions)
            )
            for request in requests
            if len(request.token_ids) <= max_positions
        )
        return cls(
            max_new_tokens=params.max_new_tokens,
            max_positions=max_positions,
            eos_token_ids=() if params.ignore_eos else definition.eos_token_ids,
            batch_size=batch_size,
            num_pages=max(1, sum(needs[-batch_size:])),
        )

    def new_tokens(self, request: Request) -> int:
        """Tokens a request may make."""
        return _new_tokens(request, self.max_new_tokens, self.max_positions)

    def pages(self, request: Request) -> int:
        """Pages it needs for that."""
        return pages_for(len(request.token_ids) + self.new_tokens(request))

    def refusal(self, request: Request) -> str | None:
        """Why a request can never run, or None."""
        length = len(request.token_ids)
        if length == 0:
            return "the prompt has no tokens"
        if length > self.max_positions:
            return f"the prompt has {length} tokens, the model takes {self.max_positions}"
        if self.pages(request) > self.num_pages:
            return f"needs {self.pages(request)} pages of KV cache, there are {self.num_pages}"
        return None


def _new_tokens(request: Request, max_new_tokens: int, max_positions: int) -> int:
    return min(max_new_tokens, max_positions - len(request.token_ids) + 1)


@dataclass(kw_only=True)
class Flight:
    """A request in flight.

    Attributes:
        request: what was asked.
        slot: its place in the batch.
        home: the rank where its tokens start a step.
        domain: the coherence domain that has its keys and values.
        pages: where in the cache.
        token_ids: the tokens it has made.
    """

    request: Request
    slot: int
    home: int
    domain: int
    pages: list[int]
    token_ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Position of the newest token, the one a decode step takes in."""
        return len(self.request.token_ids) + len(self.token_ids) - 1


class Scheduler:
    """Queue, slots and pages of all requests of a job."""

    def __init__(
        self, requests: Sequence[Request], limits: Limits, *, domain_of_rank: Sequence[int]
    ) -> None:
        self._waiting = deque(requests)
        self._limits = limits
        self._domain_of_rank = list(domain_of_rank)
        self._pools = [PagePool(limits.num_pages) for _ in set(domain_of_rank)]
        self._free_slots = list(range(limits.batch_size))[::-1]
        self.running: list[Flight] = []

    @property
    def has_work(self) -> bool:
        """Whether any request waits or is in flight."""
        return bool(self._waiting or self.running)

    def join(self) -> tuple[list[Flight], list[Completion]]:
        """Let waiting requests in as far as there is room; those that never fit are refused."""
        joined, refused = [], []
        while self._waiting and self._free_slots:
            request = self._waiting[0]
            reason = self._limits.refusal(request)
            home = request.index % len(self._domain_of_rank)
            pool = self._pools[self._domain_of_rank[home]]
            if reason is not None:
                refused.append(_refuse(request, reason))
            elif self._limits.pages(request) <= pool.num_free:
                joined.append(self._start(request, home, pool))
            else:
                break
            self._waiting.popleft()
        self.running += joined
        return joined, refused

    def advance(self, token_of_slot: dict[int, int]) -> list[Completion]:
        """Add each slot's new token; finished requests leave."""
        finished = []
        for flight in [flight for flight in self.running if flight.slot in token_of_slot]:
            flight.token_ids.append(token_of_slot[flight.slot])
            reason = self._finish_reason(flight)
            if reason is not None:
                self._leave(flight)
                finished.append(
                    Completion(
                        request=flight.request,
                        token_ids=tuple(flight.token_ids),
                        finish_reason=reason,
                    )
                )
        return finished

    def _start(self, request: Request, home: int, pool: PagePool) -> Flight:
        return Flight(
            request=request,
            slot=self._free_slots.pop(),
            home=home,
            domain=self._domain_of_rank[home],
            pages=pool.take(self._limits.pages(request)),
        )

    def _finish_reason(self, flight: Flight) -> FinishReason | None:
        if flight.token_ids[-1] in self._limits.eos_token_ids:
            return "stop"
        if len(flight.token_ids) == self._limits.new_tokens(flight.request):
            return "length"
        return None

    def _leave(self, flight: Flight) -> None:
        self.running.remove(flight)
        self._free_slots.append(flight.slot)
        self._pools[flight.domain].give_back(flight.pages)


def _refuse(request: Request, reason: str) -> Completion:
    return Completion(request=request, token_ids=(), finish_reason="refused", reason=reason)
