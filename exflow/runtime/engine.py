"""Engine: prompts in, tokens out, over all ranks of a job.

Every rank runs the same steps: requests join, their prompts are read (prefill), and each request in
flight makes one token (decode).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from exflow.runtime.attention import Rotary
from exflow.runtime.dispatchers import hops_for, make_dispatchers
from exflow.runtime.kv_budget import KvBudget
from exflow.runtime.kv_cache import KvCache
from exflow.runtime.limits import Limits
from exflow.runtime.metrics import PHASES, PhaseMetrics
from exflow.runtime.opening import Opening
from exflow.runtime.requests import NewToken
from exflow.runtime.sampling import UNSOUND
from exflow.runtime.scheduler import Scheduler
from exflow.runtime.sharing import MESSAGE_BYTES, Routes, find_relays
from exflow.runtime.steps import Steps
from exflow.runtime.tables import PlacementTables
from exflow.runtime.wire import Wire
from placement.errors import UserError
from placement.traffic import DISPATCHES, PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from exflow.runtime.decoder import Decoder
    from exflow.runtime.dispatchers import Hops
    from exflow.runtime.graphs import StepGraphs
    from exflow.runtime.metrics import Phase
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.recorder import DecodeRecorder
    from exflow.runtime.requests import Completion, Request, SamplingParams
    from exflow.runtime.text import Detokenizer
    from placement.plan import PlacementPlan
    from placement.traffic import Dispatch, Protocol


class EngineError(UserError):
    """Options that make no sense."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to decode.

    Attributes:
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None for all. Ignored under `home`.
        dispatch: "flat"; "hierarchical": rows cross to a node once; "auto": hierarchical if the
            job runs on several hosts and the plan has several ranks a node (`--protocol auto`
            decides before); "replicated": every
            rank attends to all tokens and only partial sums travel, for small batches, under
            `coherent` with one domain.
        prefill_dispatch: how the tokens of prompts reach experts, and keys and values the other
            nodes; "auto": as in decode steps, if `dispatch` says "flat" or "hierarchical".
        batch_size: requests in flight, over all ranks.
        kv_budget: memory for keys and values on each rank; without limits, what the longest
            `batch_size` requests need.
        prefill_chunk: prompt tokens that a rank reads between two decode steps; None for all.
        cuda_graphs: on a GPU, steps that are alike are recorded once and replayed, on one rank or
            where dispatch is replicated; not while routing is recorded.
        share_bytes: keys and values leave for the coherence domain during a step, beside the rows,
            whenever ranks have so many bytes of them on average; the rest at its end. A layer of
            the next step waits for those it needs.
    """

    protocol: Protocol = "coherent"
    coherence_domain: int | None = None
    dispatch: Literal["auto"] | Dispatch = "auto"
    prefill_dispatch: Literal["auto", "flat", "hierarchical"] = "auto"
    batch_size: int = 16
    kv_budget: KvBudget = field(default_factory=KvBudget)
    prefill_chunk: int | None = 2048
    cuda_graphs: bool = True
    share_bytes: int = MESSAGE_BYTES

    def __post_init__(self) -> None:
        counts = {
            "batch-size": self.batch_size,
            "prefill-chunk": self.prefill_chunk,
            "share-bytes": self.share_bytes,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                msg = f"--{name} must be at least 1, got {count}"
                raise EngineError(msg)
        known = {
            "protocol": PROTOCOLS,
            "dispatch": ("auto", *DISPATCHES),
            "prefill-dispatch": ("auto", "flat", "hierarchical"),
        }
        for name, choices in known.items():
            value = getattr(self, name.replace("-", "_"))
            if value not in choices:
                msg = f"--{name} must be one of {', '.join(choices)}; got {value!r}"
                raise EngineError(msg)

    def dispatch_for(self, plan: PlacementPlan, ranks: Ranks) -> Dispatch:
        """How tokens reach experts in decode steps, for a plan on these ranks.

        Raises:
            EngineError: dispatch is to be replicated, and keys and values are not on all ranks.
        """
        if self.dispatch != "replicated":
            return hops_for(self.dispatch, plan, ranks)
        if self.domain_size not in (None, ranks.num_ranks):
            msg = (
                "--dispatch replicated needs the keys and values of all requests on every rank: "
                "use --protocol coherent without --coherence-domain"
            )
            raise EngineError(msg)
        return "replicated" if ranks.num_ranks > 1 else "flat"

    def prefill_dispatch_for(self, plan: PlacementPlan, ranks: Ranks) -> Hops:
        """How the tokens of prompts reach experts; they are too many to be on all ranks."""
        wanted = self.prefill_dispatch
        if wanted == "auto" and self.dispatch != "replicated":
            wanted = self.dispatch
        return hops_for(wanted, plan, ranks)

    @property
    def domain_size(self) -> int | None:
        """Ranks that hold the keys and values of the same requests; None for all."""
        return 1 if self.protocol == "home" else self.coherence_domain


class Engine:
    """A decoder whose experts are spread over ranks by a plan.

    Attributes:
        metrics: counts of this rank by phase.
        scheduler: the requests under way, once there are some.
        step: the forward pass under way, in words.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: PlacementPlan,
        ranks: Ranks,
        *,
        options: EngineOptions,
        recorder: DecodeRecorder | None = None,
        tokenizer: Detokenizer | None = None,
    ) -> None:
        """An engine on this rank; every rank of the job makes its own.

        Args:
            decoder: the model with this rank's weights.
            plan: where experts are.
            ranks: this rank.
            options: how to decode.
            recorder: takes down the routing of decode steps.
            tokenizer: makes text; needed for stop strings and for completions with text.
        """
        embedding = decoder.weights.embedding
        self._definition = decoder.definition
        self._options = options
        self._tokenizer = tokenizer
        self._is_first = ranks.is_first
        self.scheduler: Scheduler | None = None
        self.step = "loading"
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
        dispatch = options.dispatch_for(plan, ranks)
        domain_of_rank: list[int] = tables.domain_of_rank.tolist()
        nodes: list[int] = tables.node_of_rank.tolist()
        prompts = options.prefill_dispatch_for(plan, ranks)
        has_hops = "hierarchical" in (prompts, dispatch)
        routes = Routes(domain_of_rank, find_relays(domain_of_rank, nodes) if has_hops else None)
        wire = Wire(
            ranks,
            embedding.device,
            self.metrics["prefill"],
            num_nodes=plan.topology.num_nodes if has_hops else 1,
            has_background=routes.has_domains,
        )
        rotary = Rotary(decoder.definition, dtype=embedding.dtype, device=embedding.device)
        self._opening = Opening(decoder, rotary, tables, ranks)
        self._steps = Steps(
            decoder=decoder,
            rotary=rotary,
            dispatchers=make_dispatchers(
                tables,
                wire,
                decoder,
                prompts=prompts,
                steps=dispatch,
                is_coherent=routes.has_domains,
            ),
            wire=wire if ranks.num_ranks > 1 else None,
            metrics=self.metrics,
            recorder=recorder if ranks.is_first or dispatch != "replicated" else None,
            opening=self._opening if routes.has_domains and dispatch != "replicated" else None,
            rank=ranks.rank,
            domain_of_rank=domain_of_rank,
            routes=routes,
            share_bytes=options.share_bytes,
            can_record=options.cuda_graphs
            and embedding.is_cuda
            and recorder is None
            and (ranks.num_ranks == 1 or (dispatch == "replicated" and ranks.uses_nccl())),
        )
        self._cached: tuple[KvCache, StepGraphs] | None = None

    def connect(self) -> None:
        """Connect to the other ranks, and settle with them where tokens start; all must ask.

        `generate` does it, too; what the first call does, later ones need not.
        """
        self._steps.connect()

    def foretell(self, token_ids: NDArray[np.int64]) -> NDArray[np.int16] | None:
        """(T, K) `RoutingTrace.foretold_ids` of tokens; None if the gate does not tell them apart."""
        return self._opening.foretold(token_ids)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams | None = None,
        *,
        on_token: Callable[[NewToken], None] | None = None,
    ) -> Iterator[Completion]:
        """Run requests; completions come as they finish, in the same order on every rank.

        Args:
            requests: the same on all ranks.
            params: how to sample all of them, instead of their own parameters.
            on_token: called on rank 0 with every new token.

        Raises:
            EngineError: a request has stop strings, and the engine no tokenizer; or the model's
                logits are no numbers.
        """
        if params is not None:
            requests = [replace(request, params=params) for request in requests]
        if self._tokenizer is None and any(request.params.stop for request in requests):
            msg = "stop strings need a tokenizer; give the engine one or use stop_token_ids"
            raise EngineError(msg)
        if not requests:
            return
        limits = self._limits(requests)
        scheduler = Scheduler(
            requests,
            limits,
            domain_of_rank=self._steps.domain_of_rank,
            tokenizer=self._tokenizer,
            is_streaming=on_token is not None and self._is_first,
        )
        cache, graphs = self._take_cache(requests, limits)
        steps = self._steps
        self.connect()
        sharing = steps.start_sharing(cache)
        self.scheduler = scheduler
        while scheduler.has_work:
            yield from scheduler.join()[1]
            chunks = scheduler.next_chunks()
            if chunks:
                self.step = f"prefill step {self.metrics['prefill'].steps + 1}"
                yield from self._advance(steps.prefill(chunks, cache, sharing), on_token)
            decoding = scheduler.decoding
            if decoding:
                self.step = f"decode step {self.metrics['decode'].steps + 1}"
                yield from self._advance(steps.decode(decoding, cache, sharing, graphs), on_token)
        steps.drain("decode", sharing)
        self._cached = None if graphs is None else (cache, graphs)

    def _advance(
        self, token_of_slot: dict[int, int], on_token: Callable[[NewToken], None] | None
    ) -> list[Completion]:
        """Give requests their new tokens, and tell who listens."""
        assert self.scheduler is not None
        if UNSOUND in token_of_slot.values():
            msg = f"logits are NaN or infinite at {self.step}: the checkpoint may hold such weights"
            if self._embedding.dtype is torch.float16:
                msg += ", or float16 is too narrow for it: try --dtype bfloat16"
            raise EngineError(msg)
        flights = [flight for flight in self.scheduler.running if flight.slot in token_of_slot]
        completions = self.scheduler.advance(token_of_slot)
        if on_token is not None and self._is_first:
            reasons = {done.request.index: done.finish_reason for done in completions}
            for flight in flights:
                reason = reasons.get(flight.request.index)
                stream = flight.stream
                on_token(
                    NewToken(
                        request=flight.request,
                        token_id=flight.token_ids[-1],
                        text="" if stream is None else stream.take(is_last=reason is not None),
                        finish_reason=reason,
                    )
                )
        return completions

    def can_run(self, requests: Sequence[Request]) -> list[Request]:
        """Those of some requests that would not be refused."""
        limits = self._limits(requests)
        return [request for request in requests if limits.refusal(request) is None]

    def _limits(self, requests: Sequence[Request]) -> Limits:
        return Limits.for_requests(
            requests,
            self._definition,
            batch_size=self._options.batch_size,
            max_pages=self._options.kv_budget.pages(self._definition, self._embedding.dtype),
            prefill_chunk=self._options.prefill_chunk,
        )

    def _take_cache(
        self, requests: Sequence[Request], limits: Limits
    ) -> tuple[KvCache, StepGraphs | None]:
        """An empty cache, and the steps recorded on it: the last run's if they are of this shape."""
        pages = [limits.pages(request) for request in self.can_run(requests)]
        shape = {
            "num_pages": limits.num_pages,
            "num_slots": limits.batch_size,
            "pages_per_slot": max(pages, default=1),
        }
        last, self._cached = self._cached, None
        if last is not None and last[0].has_shape(**shape):
            last[0].clear()
            return last
        del last  # before there is memory for another
        cache = KvCache(
            **shape,
            num_layers=self._definition.num_layers,
            width=self._definition.kv_width,
            dtype=self._embedding.dtype,
            device=self._embedding.device,
        )
        return cache, self._steps.graphs_for(cache)
