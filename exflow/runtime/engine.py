"""Engine: prompts in, tokens out, over all ranks of a job.

Every rank runs the same steps: requests join, their prompts are read (prefill), and each request in
flight makes one token (decode).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.runtime.attention import Rotary
from exflow.runtime.dispatcher import (
    CoherentDispatcher,
    Dispatcher,
    HomeDispatcher,
    LocalDispatcher,
)
from exflow.runtime.kv_cache import KvCache
from exflow.runtime.metrics import PHASES, PhaseMetrics
from exflow.runtime.rows import RowFormat
from exflow.runtime.scheduler import Limits, Scheduler
from exflow.runtime.steps import Steps
from exflow.runtime.tables import PlacementTables
from exflow.runtime.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from exflow.runtime.decoder import Decoder
    from exflow.runtime.metrics import Phase
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.recorder import DecodeRecorder
    from exflow.runtime.requests import Completion, Request, SamplingParams
    from placement.plan import PlacementPlan
    from placement.traffic import Protocol


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to decode.

    Attributes:
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None for all. Ignored under `home`.
        batch_size: requests in flight, over all ranks.
    """

    protocol: Protocol = "coherent"
    coherence_domain: int | None = None
    batch_size: int = 16

    @property
    def domain_size(self) -> int | None:
        """Ranks that hold the keys and values of the same requests; None for all."""
        return 1 if self.protocol == "home" else self.coherence_domain


class Engine:
    """A decoder whose experts are spread over ranks by a plan.

    Attributes:
        metrics: counts of this rank by phase.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: PlacementPlan,
        ranks: Ranks,
        *,
        options: EngineOptions,
        recorder: DecodeRecorder | None = None,
    ) -> None:
        embedding = decoder.weights.embedding
        self._definition = decoder.definition
        self._options = options
        self._embedding = embedding
        self.metrics: dict[Phase, PhaseMetrics] = {
            phase: PhaseMetrics(plan.num_layers, plan.num_ranks) for phase in PHASES
        }
        tables = PlacementTables.from_plan(
            plan,
            ranks.rank,
            top_k=decoder.definition.top_k,
            coherence_domain=options.domain_size,
            device=embedding.device,
        )
        wire = Wire(ranks, embedding.device, self.metrics["prefill"])
        self._steps = Steps(
            decoder=decoder,
            rotary=Rotary(decoder.definition, dtype=embedding.dtype, device=embedding.device),
            dispatchers=_make_dispatchers(tables, wire, decoder, options),
            wire=wire if ranks.num_ranks > 1 else None,
            metrics=self.metrics,
            recorder=recorder,
            rank=ranks.rank,
            domain_of_rank=tables.domain_of_rank.tolist(),
        )

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Run requests; completions come as they finish, in the same order on every rank.

        Args:
            requests: the same on all ranks.
            params: how to sample.
        """
        limits = Limits.for_requests(
            requests,
            self._definition,
            params=params,
            batch_size=self._options.batch_size,
        )
        scheduler = Scheduler(requests, limits, domain_of_rank=self._steps.domain_of_rank)
        cache = self._make_cache(requests, limits)
        while scheduler.has_work:
            joined, refused = scheduler.join()
            yield from refused
            if joined:
                yield from scheduler.advance(self._steps.prefill(joined, cache, params))
            if scheduler.running:
                tokens = self._steps.decode(scheduler.running, cache, params)
                yield from scheduler.advance(tokens)

    def _make_cache(self, requests: Sequence[Request], limits: Limits) -> KvCache:
        pages = [limits.pages(r) for r in requests if limits.refusal(r) is None]
        return KvCache(
            num_layers=self._definition.num_layers,
            num_pages=limits.num_pages,
            width=self._definition.kv_width,
            num_slots=limits.batch_size,
            pages_per_slot=max(pages, default=1),
            dtype=self._embedding.dtype,
            device=self._embedding.device,
        )


def _make_dispatchers(
    tables: PlacementTables, wire: Wire, decoder: Decoder, options: EngineOptions
) -> dict[Phase, Dispatcher]:
    """Prompts are read at home; decode follows the protocol."""
    if tables.num_ranks == 1:
        local = LocalDispatcher(tables=tables)
        return {"prefill": local, "decode": local}
    definition = decoder.definition

    def row_format(*, has_owner: bool) -> RowFormat:
        return RowFormat(
            hidden_size=definition.hidden_size,
            top_k=definition.top_k,
            dtype=decoder.weights.embedding.dtype,
            has_owner=has_owner,
        )

    home = HomeDispatcher(tables=tables, format=row_format(has_owner=False), wire=wire)
    if options.protocol == "home":
        return {"prefill": home, "decode": home}
    coherent = CoherentDispatcher(
        tables=tables,
        format=row_format(has_owner=True),
        wire=wire,
        num_domains=int(tables.domain_of_rank.max()) + 1,
    )
    return {"prefill": home, "decode": coherent}
