"""CUDA graphs of decode steps: what a step launches is recorded once and replayed at once.

    host, eager     launch launch launch ...          hundreds of times a step
    host, recorded  copy inputs, replay               twice

That needs steps whose shapes are known before they begin, and in which the host asks for no value: on
one rank, or where dispatch is replicated. A *shape* is how many tokens each rank has and how many pages
of context attention reads, rounded up. Shape suffixes: S slots, T tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from exflow.runtime.kv_cache import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from exflow.runtime.dispatcher import Tokens
    from exflow.runtime.kv_cache import KvCache
    from exflow.runtime.metrics import PhaseMetrics

Shape: TypeAlias = tuple[tuple[int, ...], int]
PAGES_APART = 8
MAX_RECORDED = 64  # each holds memory that no budget knows of; other shapes stay eager
TIMES_EAGER = 4  # recording takes as long as some steps; a shape that soon changes is not worth it


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """What a decode step begins with, on the device.

    Attributes:
        token_ids: (T,) the newest token of each request.
        slots: (T,) their slots.
        positions: (S,) position of each slot's new token.
        longest: no position in use is above it.
        owned: how many tokens each rank has.
    """

    token_ids: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    longest: int
    owned: tuple[int, ...]


Outputs: TypeAlias = "tuple[Tokens, torch.Tensor]"
Step: TypeAlias = "Callable[[StepInputs, PhaseMetrics], Outputs]"
Work: TypeAlias = "Callable[[PhaseMetrics], Outputs]"
Record: TypeAlias = "Callable[[Work, PhaseMetrics], tuple[Recording, Outputs]]"


class Recording(Protocol):
    """Work that can be done again."""

    def replay(self) -> None:
        """Do it, on the tensors it was recorded with."""


class StepGraphs:
    """The recorded steps of one cache."""

    def __init__(
        self,
        cache: KvCache,
        step: Step,
        record: Record,
        new_metrics: Callable[[], PhaseMetrics],
    ) -> None:
        """Nothing is recorded yet.

        Args:
            cache: what the step reads and writes.
            step: from inputs to tokens and logits.
            record: records work; what it will give, and counts of one time.
            new_metrics: makes counts to begin with.
        """
        self._step = step
        self._record = record
        self._new_metrics = new_metrics
        self._seen: Counter[Shape] = Counter()
        self._recorded: dict[Shape, tuple[Recording, Outputs, PhaseMetrics]] = {}
        num_slots, self._max_pages = cache.page_table.shape
        device = cache.page_table.device
        # Recorded steps read from here: positions, slots, token ids.
        self._on_device = torch.zeros((3, num_slots), dtype=torch.int64, device=device)
        self._on_host = torch.zeros(
            (3, num_slots), dtype=torch.int64, pin_memory=device.type == "cuda"
        )

    def run(
        self,
        token_ids: Sequence[int],
        slots: Sequence[int],
        positions_S: NDArray[np.int64],
        owned: tuple[int, ...],
        metrics: PhaseMetrics,
    ) -> Outputs:
        """A step, replayed if its shape has come often enough.

        What it returns is valid until the next step.

        Args:
            token_ids: the newest token of each request.
            slots: their slots.
            positions_S: position of each slot's new token.
            owned: how many tokens each rank has.
            metrics: what the step's rows, bytes and messages are counted in.
        """
        num_pages = int(positions_S.max()) // PAGE_SIZE + 1
        shape = owned, min(-(-num_pages // PAGES_APART) * PAGES_APART, self._max_pages)
        inputs = self._fill(token_ids, slots, positions_S, shape)
        self._seen[shape] += 1
        is_recorded = shape in self._recorded
        is_full = len(self._recorded) >= MAX_RECORDED
        if not is_recorded and (is_full or self._seen[shape] <= TIMES_EAGER):
            return self._step(inputs, metrics)
        if not is_recorded:
            counts = self._new_metrics()
            recording, outputs = self._record(partial(self._step, inputs), counts)
            self._recorded[shape] = recording, outputs, counts
        recording, outputs, counts = self._recorded[shape]
        recording.replay()
        metrics.add_counts(counts)
        return outputs

    @property
    def num_recorded(self) -> int:
        """Shapes that are replayed."""
        return len(self._recorded)

    def _fill(
        self,
        token_ids: Sequence[int],
        slots: Sequence[int],
        positions_S: NDArray[np.int64],
        shape: Shape,
    ) -> StepInputs:
        """Bring a step's inputs to where a recorded step reads them."""
        num_tokens, on_host = len(slots), self._on_host.numpy()
        on_host[0] = positions_S
        on_host[1, :num_tokens] = slots
        on_host[2, :num_tokens] = token_ids
        self._on_device.copy_(self._on_host, non_blocking=True)
        positions, slots_S, token_ids_S = self._on_device
        owned, num_pages = shape
        return StepInputs(
            token_ids=token_ids_S[:num_tokens],
            slots=slots_S[:num_tokens],
            positions=positions,
            longest=num_pages * PAGE_SIZE - 1,
            owned=owned,
        )


class CudaRecorder:
    """Records into CUDA graphs; all share their memory, since none runs beside another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work, counts: PhaseMetrics) -> tuple[Recording, Outputs]:
        """The graph, and the tensors it will write."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = work(counts)
        return graph, outputs
