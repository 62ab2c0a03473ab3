"""Scheduler: which requests are in flight. Every rank runs it and comes to the same result.

A request joins when a slot and pages for its whole length are free in its coherence domain, so
nothing in flight ever has to give its pages up, and leaves when it finishes. Requests of a domain
join in order. Prompts are read in parts between decode steps, `Limits.prefill_chunk` tokens a rank
at a time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exflow.runtime.kv_cache import PagePool
from exflow.runtime.requests import Completion, FinishReason, Request
from exflow.runtime.text import TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.runtime.limits import Limits
    from exflow.runtime.text import Detokenizer


@dataclass(kw_only=True)
class Flight:
    """A request in flight.

    Attributes:
        request: what was asked.
        slot: its place in the batch.
        home: the rank that reads its prompt, and where its tokens start a decode step unless an
            `Opening` says otherwise.
        domain: the coherence domain that has its keys and values.
        pages: where in the cache.
        read: how many tokens of its prompt are read, or will be when the pass under way ends.
        token_ids: the tokens it has made.
        stream: their text, where somebody waits for it.
    """

    request: Request
    slot: int
    home: int
    domain: int
    pages: list[int]
    read: int = 0
    token_ids: list[int] = field(default_factory=list)
    stream: TextStream | None = None

    @property
    def position(self) -> int:
        """Position of the newest token, the one a decode step takes in."""
        return len(self.request.token_ids) + len(self.token_ids) - 1

    @property
    def is_read(self) -> bool:
        """Whether its whole prompt is read."""
        return self.read == len(self.request.token_ids)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens `start` to `stop` of a prompt, to be read in one pass."""

    flight: Flight
    start: int
    stop: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens."""
        return self.flight.request.token_ids[self.start : self.stop]

    @property
    def is_last(self) -> bool:
        """Whether the pass that reads it makes the first new token."""
        return self.stop == len(self.flight.request.token_ids)


class Scheduler:
    """Queue, slots and pages of all requests of a job."""

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Limits,
        *,
        domain_of_rank: Sequence[int],
        tokenizer: Detokenizer | None = None,
        is_streaming: bool = False,
    ) -> None:
        """An empty batch and a queue.

        Args:
            requests: the queue.
            limits: slots, pages and positions there are.
            domain_of_rank: coherence domains.
            tokenizer: makes text; needed for stop strings.
            is_streaming: whether the text of every new token is asked for.
        """
        self._queues: list[deque[tuple[int, Request]]] = [deque() for _ in set(domain_of_rank)]
        for number, request in enumerate(requests):
            domain = domain_of_rank[request.index % len(domain_of_rank)]
            self._queues[domain].append((number, request))
        self._limits = limits
        self._domain_of_rank = list(domain_of_rank)
        self._tokenizer = tokenizer
        self._is_streaming = is_streaming
        self.pools = [PagePool(limits.num_pages) for _ in set(domain_of_rank)]
        self._free_slots = list(range(limits.batch_size))[::-1]
        self.running: list[Flight] = []

    @property
    def has_work(self) -> bool:
        """Whether any request waits or is in flight."""
        return any(self._queues) or bool(self.running)

    @property
    def decoding(self) -> list[Flight]:
        """Requests whose prompts are read."""
        return [flight for flight in self.running if flight.is_read]

    def join(self) -> tuple[list[Flight], list[Completion]]:
        """Let waiting requests in as far as there is room; those that never fit are refused.

        Where pages run out in one domain, requests of the others still join.
        """
        joined, refused = [], []
        full: set[int] = set()
        while self._free_slots:
            heads = [q for domain, q in enumerate(self._queues) if q and domain not in full]
            if not heads:
                break
            queue = min(heads, key=lambda queue: queue[0][0])
            request = queue[0][1]
            home = request.index % len(self._domain_of_rank)
            domain = self._domain_of_rank[home]
            reason = self._limits.refusal(request)
            if reason is not None:
                refused.append(_refuse(request, reason))
            elif self._limits.pages(request) <= self.pools[domain].num_free:
                joined.append(self._start(request, home, domain))
            else:
                full.add(domain)
                continue
            queue.popleft()
        self.running += joined
        return joined, refused

    def next_chunks(self) -> list[Chunk]:
        """What the next pass reads of prompts, those that joined first; they count as read."""
        limit = self._limits.prefill_chunk
        room: list[int | None] = [limit] * len(self._domain_of_rank)
        chunks = []
        for flight in self.running:
            count = len(flight.request.token_ids) - flight.read
            left = room[flight.home]
            if left is not None:
                count = min(count, left)
                room[flight.home] = left - count
            if count > 0:
                chunks.append(Chunk(flight=flight, start=flight.read, stop=flight.read + count))
                flight.read += count
        return chunks

    def advance(self, token_of_slot: dict[int, int]) -> list[Completion]:
        """Add each slot's new token; finished requests leave."""
        finished = []
        for flight in [flight for flight in self.running if flight.slot in token_of_slot]:
            flight.token_ids.append(token_of_slot[flight.slot])
            if flight.stream is not None:
                flight.stream.add(flight.token_ids[-1])
            reason = self._finish_reason(flight)
            if reason is not None:
                self._leave(flight)
                finished.append(
                    Completion(
                        request=flight.request,
                        token_ids=tuple(flight.token_ids),
                        finish_reason=reason,
                        text=self._text(flight),
                    )
                )
        return finished

    def _start(self, request: Request, home: int, domain: int) -> Flight:
        stream = None
        if self._tokenizer is not None and (request.params.stop or self._is_streaming):
            stream = TextStream(self._tokenizer, request.params.stop)
        return Flight(
            request=request,
            slot=self._free_slots.pop(),
            home=home,
            domain=domain,
            pages=self.pools[domain].take(self._limits.pages(request)),
            stream=stream,
        )

    def _finish_reason(self, flight: Flight) -> FinishReason | None:
        params, token_id = flight.request.params, flight.token_ids[-1]
        is_end = token_id in self._limits.eos_token_ids and not params.ignore_eos
        is_stopped = flight.stream is not None and flight.stream.is_stopped
        if is_end or is_stopped or token_id in params.stop_token_ids:
            return "stop"
        if len(flight.token_ids) == self._limits.new_tokens(flight.request):
            return "length"
        return None

    def _text(self, flight: Flight) -> str:
        if self._tokenizer is None:
            return ""
        if flight.stream is not None and flight.stream.is_stopped:
            return flight.stream.text
        return self._tokenizer.decode(flight.token_ids, skip_special_tokens=True)

    def _leave(self, flight: Flight) -> None:
        self.running.remove(flight)
        self._free_slots.append(flight.slot)
        self.pools[flight.domain].give_back(flight.pages)


def _refuse(request: Request, reason: str) -> Completion:
    return Completion(request=request, token_ids=(), finish_reason="refused", reason=reason)
