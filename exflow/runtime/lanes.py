"""Lanes: micro-batches of a decode step at the same time, each with a wire of its own.

    lane 0   compute   rows ->   compute   rows ->
    lane 1             compute   rows ->   compute   rows ->

While the rows of one are under way the others compute, so that neither links nor processor wait. A
request stays in its lane. It costs more, smaller messages; where no wire is slow nothing is gained.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.runtime.graphs import StepGraphs
    from exflow.runtime.kv_cache import KvCache
    from exflow.runtime.metrics import PhaseMetrics
    from exflow.runtime.scheduler import Chunk, Flight
    from exflow.runtime.sharing import Sharing
    from exflow.runtime.steps import Steps


class Lanes:
    """The forward passes of this rank, decode in one lane or several.

    Attributes:
        steps: by lane; prompts are read in the first.
    """

    def __init__(self, steps: Sequence[Steps], metrics: PhaseMetrics, num_ranks: int) -> None:
        """The same number on every rank.

        Args:
            steps: by lane; if there are several, each with metrics and a wire of its own.
            metrics: where decode is counted in all.
            num_ranks: how many ranks there are.
        """
        self.steps = list(steps)
        self._metrics = metrics
        self._num_ranks = num_ranks
        self._threads = ThreadPoolExecutor(
            max_workers=max(1, len(self.steps) - 1),
            thread_name_prefix="lane",
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )

    def connect(self) -> None:
        """Make all connections to the other ranks; all must ask."""
        for steps in self.steps:
            steps.connect()

    def start_sharing(self, cache: KvCache) -> list[Sharing | None]:
        """What goes from rank to rank beside rows, by lane."""
        return [steps.start_sharing(cache) for steps in self.steps]

    def prefill(
        self, chunks: Sequence[Chunk], cache: KvCache, sharings: Sequence[Sharing | None]
    ) -> dict[int, int]:
        """Read parts of prompts; the first new token of each slot whose prompt ends."""
        for steps, sharing in zip(self.steps[1:], sharings[1:], strict=True):
            steps.drain("decode", sharing)  # before their pages are written anew
        return self.steps[0].prefill(chunks, cache, sharings[0])

    def decode(
        self,
        running: Sequence[Flight],
        cache: KvCache,
        sharings: Sequence[Sharing | None],
        graphs: StepGraphs | None,
    ) -> dict[int, int]:
        """One more token of every request in flight, by slot."""
        if len(self.steps) == 1:
            return self.steps[0].decode(running, cache, sharings[0], graphs)
        batches = [
            [flight for flight in running if self._lane(flight) == lane]
            for lane in range(len(self.steps))
        ]
        work = [
            (steps, batch, cache, sharing)
            for steps, batch, sharing in zip(self.steps, batches, sharings, strict=True)
            if batch
        ]
        start = time.perf_counter()
        others = [self._threads.submit(_decode, *part) for part in work[1:]]
        token_of_slot = _decode(*work[0])
        for other in others:
            token_of_slot |= other.result()
        self._metrics.steps += 1
        self._count(time.perf_counter() - start)
        return token_of_slot

    def drain(self, sharings: Sequence[Sharing | None]) -> None:
        """Wait for all that is shared; every rank must ask."""
        start = time.perf_counter()
        for steps, sharing in zip(self.steps, sharings, strict=True):
            steps.drain("decode", sharing)
        if len(self.steps) > 1:
            self._count(time.perf_counter() - start)

    def _lane(self, flight: Flight) -> int:
        """Requests of a rank take turns."""
        return flight.request.index // self._num_ranks % len(self.steps)

    def _count(self, seconds: float) -> None:
        """Count in all what the lanes counted; together they took so many seconds."""
        lanes = [steps.metrics["decode"] for steps in self.steps]
        spent = sum(sum(lane.seconds.values()) for lane in lanes)
        for lane in lanes:
            self._metrics.take_over(lane, share=seconds / spent if spent else 0.0)


@torch.inference_mode()
def _decode(
    steps: Steps, batch: Sequence[Flight], cache: KvCache, sharing: Sharing | None
) -> dict[int, int]:
    return steps.decode(batch, cache, sharing)
