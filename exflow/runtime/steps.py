"""Steps: the forward passes of a batch, from tokens in to tokens out.

Each ends with the same exchange, after which every rank knows every new token. Shape suffixes: S
slots, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exflow.runtime.attention import DecodeAttention, PrefillAttention, Rotary
from exflow.runtime.dispatcher import Dispatcher, Tokens
from exflow.runtime.forward import run_layers
from exflow.runtime.graphs import CudaRecorder, StepGraphs, StepInputs
from exflow.runtime.replicated import ReplicatedDispatcher, own_tokens
from exflow.runtime.sampling import sample
from exflow.runtime.sharing import Sharing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from exflow.runtime.attention import Attention
    from exflow.runtime.decoder import Decoder
    from exflow.runtime.kv_cache import KvCache
    from exflow.runtime.metrics import Phase, PhaseMetrics
    from exflow.runtime.opening import Opening
    from exflow.runtime.recorder import DecodeRecorder
    from exflow.runtime.scheduler import Chunk, Flight
    from exflow.runtime.sharing import Routes
    from exflow.runtime.wire import Wire


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """The forward passes of this rank.

    Attributes:
        decoder: the model.
        rotary: its position embedding.
        dispatchers: by phase; prompts are always read at home.
        wire: the collectives; None on one rank.
        metrics: counts by phase.
        recorder: takes down the routing of decode steps.
        opening: where tokens start decode steps, if owners move; else they start and end at home.
        rank: this rank.
        domain_of_rank: coherence domains.
        routes: which ranks get whose keys and values.
        share_bytes: keys and values leave during a step once a rank has so many bytes of them.
        can_record: whether decode steps may become CUDA graphs.
    """

    decoder: Decoder
    rotary: Rotary
    dispatchers: dict[Phase, Dispatcher]
    wire: Wire | None
    metrics: dict[Phase, PhaseMetrics]
    recorder: DecodeRecorder | None
    opening: Opening | None
    rank: int
    domain_of_rank: Sequence[int]
    routes: Routes
    share_bytes: int
    can_record: bool

    def connect(self) -> None:
        """Make all connections to the other ranks, and foretell with them; all must ask."""
        if self.wire is not None:
            self.wire.connect()
        if self.opening is not None:
            self.opening.prepare()

    def start_sharing(self, cache: KvCache) -> Sharing | None:
        """What goes from rank to rank beside rows, for as long as this cache is used."""
        if self.wire is None:
            return None
        return Sharing(self.wire, cache, self.routes, message_bytes=self.share_bytes)

    def prefill(
        self, chunks: Sequence[Chunk], cache: KvCache, sharing: Sharing | None
    ) -> dict[int, int]:
        """Read parts of prompts at home; the first new token of each slot whose prompt ends."""
        for chunk in chunks:
            flight = chunk.flight
            if chunk.start == 0 and flight.domain == self.domain_of_rank[self.rank]:
                cache.assign(flight.slot, flight.pages)
        mine = [chunk for chunk in chunks if chunk.flight.home == self.rank]
        lengths = [len(chunk.token_ids) for chunk in mine]
        attention = PrefillAttention(
            self.decoder.definition,
            cache,
            self.rotary,
            slots=[chunk.flight.slot for chunk in mine],
            lengths=lengths,
            starts=[chunk.start for chunk in mine],
        )
        token_ids = [token for chunk in mine for token in chunk.token_ids]
        flights = [chunk.flight for chunk in chunks]
        owned = self._by_home(flights, [len(chunk.token_ids) for chunk in chunks])
        metrics = self.metrics["prefill"]
        metrics.start(owned[self.rank])
        token_ids_T = self._tensor(token_ids)
        tokens = self._run(
            "prefill", token_ids_T, attention.slots, owned, attention, sharing, metrics
        )
        ends = np.cumsum(lengths, dtype=np.int64) - 1
        ends_T = self._tensor(ends[[chunk.is_last for chunk in mine]])
        done = [chunk.flight for chunk in chunks if chunk.is_last]
        last = Tokens(
            hidden=tokens.hidden.index_select(0, ends_T),
            slots=tokens.slots.index_select(0, ends_T),
            owned=self._by_home(done, [1] * len(done)),
        )
        logits_TV = self.decoder.logits(last.hidden)
        here = [flight for flight in done if flight.home == self.rank]
        token_of_slot = self._finish("prefill", last, logits_TV, here, sharing)
        self.drain("prefill", sharing)
        return token_of_slot

    def decode(
        self,
        running: Sequence[Flight],
        cache: KvCache,
        sharing: Sharing | None,
        graphs: StepGraphs | None = None,
    ) -> dict[int, int]:
        """One more token of every request in flight, by slot."""
        positions_S = np.zeros(len(cache.page_table), dtype=np.int64)
        requests_S, tokens_S = np.zeros_like(positions_S), np.zeros_like(positions_S)
        for flight in running:
            positions_S[flight.slot] = flight.position
            requests_S[flight.slot] = flight.request.index
            tokens_S[flight.slot] = flight.token_ids[-1]
        metrics = self.metrics["decode"]
        starts = self._starts(running, metrics)
        if self.is_replicated:
            mine = sorted(running, key=lambda flight: flight.home)
        else:
            mine = [
                flight for flight, start in zip(running, starts, strict=True) if start == self.rank
            ]
        token_ids = [flight.token_ids[-1] for flight in mine]
        slots = [flight.slot for flight in mine]
        owned = tuple(np.bincount(starts, minlength=len(self.domain_of_rank)).tolist())
        metrics.start(owned[self.rank])
        if graphs is not None:
            tokens, logits_TV = graphs.run(token_ids, slots, positions_S, owned, metrics)
            metrics.lap("layers")
        else:
            inputs = StepInputs(
                token_ids=self._tensor(token_ids),
                slots=self._tensor(slots),
                positions=self._tensor(positions_S),
                longest=int(positions_S.max()),
                owned=owned,
            )
            tokens, logits_TV = self.step(inputs, cache, sharing, metrics)
        if self.recorder is not None:
            self.recorder.end_step(requests_S, positions_S, tokens_S)
        here = [flight for flight in mine if flight.home == self.rank]
        if self.opening is not None:
            flight_of_slot = {flight.slot: flight for flight in running}
            here = [flight_of_slot[slot] for slot in tokens.slots.tolist()]
        return self._finish("decode", tokens, logits_TV, here, sharing)

    def step(
        self, inputs: StepInputs, cache: KvCache, sharing: Sharing | None, metrics: PhaseMetrics
    ) -> tuple[Tokens, torch.Tensor]:
        """Where tokens end, and their logits."""
        attention = DecodeAttention(
            self.decoder.definition,
            cache,
            self.rotary,
            positions_S=inputs.positions,
            longest=inputs.longest,
        )
        tokens = self._run(
            "decode",
            inputs.token_ids,
            inputs.slots,
            inputs.owned,
            attention,
            None if self.is_replicated else sharing,
            metrics,
        )
        if self.is_replicated:
            tokens = own_tokens(tokens, self.rank)
        return tokens, self.decoder.logits(tokens.hidden)

    @property
    def is_replicated(self) -> bool:
        """Whether every rank takes all tokens through a decode step."""
        return isinstance(self.dispatchers["decode"], ReplicatedDispatcher)

    def graphs_for(self, cache: KvCache) -> StepGraphs | None:
        """Where decode steps on a cache are recorded, if they can be."""
        if not self.can_record:
            return None
        return StepGraphs(
            cache,
            lambda inputs, metrics: self.step(inputs, cache, None, metrics),
            CudaRecorder(),
            self.metrics["decode"].like,
        )

    def drain(self, phase: Phase, sharing: Sharing | None) -> None:
        """Wait, on behalf of a phase, for all that is shared; every rank must ask."""
        if sharing is not None:
            metrics = self.metrics[phase]
            metrics.resume()
            sharing.drain()
            metrics.lap("share")

    def _run(
        self,
        phase: Phase,
        token_ids_T: torch.Tensor,
        slots_T: torch.Tensor,
        owned: tuple[int, ...],
        attention: Attention,
        sharing: Sharing | None,
        metrics: PhaseMetrics,
    ) -> Tokens:
        """Tokens through all layers."""
        if self.wire is not None:
            self.wire.metrics = metrics
        return run_layers(
            self.decoder,
            Tokens(hidden=self.decoder.embed(token_ids_T), slots=slots_T, owned=owned),
            attention,
            self.dispatchers[phase],
            metrics=metrics,
            recorder=self.recorder if phase == "decode" else None,
            sharing=sharing,
        )

    def _finish(
        self,
        phase: Phase,
        tokens: Tokens,
        logits_TV: torch.Tensor,
        here: Sequence[Flight],
        sharing: Sharing | None,
    ) -> dict[int, int]:
        """Sample where the tokens stand, whose requests are `here`, and share what is new."""
        metrics = self.metrics[phase]
        if self.wire is not None:
            self.wire.metrics = metrics
        token_ids_T = sample(
            logits_TV,
            [flight.request.params for flight in here],
            request_indices=np.array([flight.request.index for flight in here], dtype=np.int64),
            positions=np.array([flight.position + 1 for flight in here], dtype=np.int64),
        )
        metrics.lap("sampling")
        if sharing is None:
            slots = [flight.slot for flight in here]
            return dict(zip(slots, token_ids_T.tolist(), strict=True))
        token_of_slot = sharing.finish(
            slots_T=tokens.slots, token_ids_T=token_ids_T, owned=tokens.owned
        )
        metrics.lap("share")
        return token_of_slot

    def _starts(self, flights: Sequence[Flight], metrics: PhaseMetrics) -> list[int]:
        """The rank where each request's token starts a decode step."""
        homes = [flight.home for flight in flights]
        if self.opening is None:
            return homes
        metrics.resume()
        starts = self.opening.owners([flight.token_ids[-1] for flight in flights], homes)
        metrics.lap("start")
        return starts

    def _by_home(self, flights: Sequence[Flight], counts: Sequence[int]) -> tuple[int, ...]:
        """Tokens that start on each rank."""
        owned = [0] * len(self.domain_of_rank)
        for flight, count in zip(flights, counts, strict=True):
            owned[flight.home] += count
        return tuple(owned)

    def _tensor(self, values: Sequence[int] | NDArray[Any]) -> torch.Tensor:
        device = self.decoder.weights.embedding.device
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)
