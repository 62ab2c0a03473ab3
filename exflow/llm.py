"""LLM: a model that generates, from Python, on one rank or under torchrun.

    from exflow import LLM, SamplingParams

    with LLM("pile-moe-top4", plan="plan.json") as llm:
        for done in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(done.text)

Under torchrun every rank runs the same lines with the same prompts, and gets the same completions.
Whatever cannot be done, here or on another rank, is an `exflow.UserError` that says what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exflow.models.checkpoint import Checkpoint
from exflow.runtime.agreement import check_same
from exflow.runtime.engine import EngineOptions
from exflow.runtime.kv_budget import KvBudget
from exflow.runtime.model import ModelOptions, load_engine, prepare_model, routing_for
from exflow.runtime.progress import with_progress
from exflow.runtime.ranks import DEFAULT_TIMEOUT, Ranks
from exflow.runtime.requests import Completion, Request, SamplingParams
from placement.errors import UserError
from placement.json_text import can_encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from exflow.runtime.requests import NewToken
    from placement.plan import PlacementPlan
    from placement.traffic import Dispatch, Protocol


class LLMError(UserError):
    """Prompts and parameters that do not belong together."""


class LLM:
    """A decoder whose experts are spread over the ranks of this job.

    Attributes:
        ranks: this process among the others.
        tokenizer: the model's.
    """

    def __init__(
        self,
        model: str,
        *,
        plan: str | Path | PlacementPlan | None = None,
        protocol: Protocol | Literal["auto"] = "coherent",
        coherence_domain: int | None = None,
        dispatch: Literal["auto"] | Dispatch = "auto",
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 16,
        kv_cache_tokens: int | None = None,
        kv_memory: str | int | None = None,
        prefill_chunk: int | None = 2048,
        cuda_graphs: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
        routing: str | Path | None = None,
    ) -> None:
        """Load a rank's share of a model.

        Args:
            model: a bundled model's name, a folder or a hub id.
            plan: a placement plan or its file; without one, experts lie in order.
            protocol: "coherent": tokens stay where their experts are; "home": they return;
                "auto": what costs least on `routing`.
            coherence_domain: ranks that share keys and values; None for all.
            dispatch: "flat", "hierarchical" (rows cross to a node once), "replicated" (every rank
                attends to all tokens, for small batches), or "auto".
            dtype: "auto", "float32", "bfloat16" or "float16".
            device: "auto", "cpu", "cuda" or "cuda:N".
            batch_size: requests in flight, over all ranks.
            kv_cache_tokens: tokens of context that a rank has memory for.
            kv_memory: the same in bytes: a number, or text like "2GiB".
            prefill_chunk: prompt tokens a rank reads between two decode steps; None for all.
            cuda_graphs: on a GPU, record steps that are alike once and replay them.
            timeout: seconds after which a rank that does not answer is given up.
            routing: a trace of the model, for protocol "auto".

        Raises:
            UserError: the model, the plan or the options cannot be used; on every rank.
        """
        engine = EngineOptions(
            protocol="home" if protocol == "auto" else protocol,  # auto: chosen later
            coherence_domain=coherence_domain,
            dispatch=dispatch,
            batch_size=batch_size,
            kv_budget=_budget(kv_cache_tokens, kv_memory),
            prefill_chunk=prefill_chunk,
            cuda_graphs=cuda_graphs,
        )
        path = Path(plan) if isinstance(plan, str) else plan
        options = ModelOptions(
            model=model,
            plan=path,
            engine=engine,
            dtype=dtype,
            device=device,
            timeout=timeout,
            routing=routing_for(protocol, None if routing is None else Path(routing)),
        )
        self.ranks = Ranks.from_environment()
        self._prepared = prepare_model(options, self.ranks)
        self.tokenizer = self._prepared.tokenizer
        with contextlib.ExitStack() as stack:
            connection = self.ranks.connected(self._prepared.device, timeout=timeout)
            self._liveness = stack.enter_context(connection)
            with self._liveness.naming():
                with self.ranks.agreeing(self._prepared.device):
                    checkpoint = Checkpoint(self._prepared.folder)
                    given = self._prepared.given(checkpoint)
                check_same(given, self.ranks, self._prepared.device)
                with self.ranks.agreeing(self._prepared.device):
                    self._engine = load_engine(self._prepared, checkpoint, self.ranks)
                self._engine.connect()
            self._liveness.where = lambda: self._engine.step
            self._connection = stack.pop_all()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the other ranks."""
        self._connection.close()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: Callable[[NewToken], None] | None = None,
        show_progress: bool = True,
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: texts, or their token ids; the same on all ranks.
            sampling_params: for all prompts, or one for each.
            on_token: called on rank 0 with every token as it is made.
            show_progress: whether rank 0 shows how far it is, on a terminal.

        Returns:
            A completion for each prompt, in their order.

        Raises:
            UserError: parameters do not match the prompts, or a prompt is no text and no tokens of
                the model (`LLMError`); ranks were given different ones (`AgreementError`); another
                rank cannot go on (`RankFailureError`).
        """
        with self._liveness.naming():
            with self.ranks.agreeing(self._prepared.device):
                requests = self._requests([prompts] if isinstance(prompts, str) else prompts)
                requests = _with_params(requests, sampling_params)
            return self._complete(requests, on_token, is_shown=show_progress)

    def _complete(
        self,
        requests: list[Request],
        on_token: Callable[[NewToken], None] | None,
        *,
        is_shown: bool,
    ) -> list[Completion]:
        check_same(
            {
                "prompts": [(request.prompt, request.token_ids) for request in requests],
                "sampling_params": [request.params for request in requests],
            },
            self.ranks,
            self._prepared.device,
        )
        made = self._engine.generate(requests, on_token=on_token)
        is_shown = is_shown and self.ranks.is_first
        found = {
            completion.request.index: completion
            for completion in with_progress(made, len(requests), is_shown=is_shown)
        }
        return [found[request.index] for request in requests]

    def _requests(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[Request]:
        requests = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if not can_encode(prompt):
                    msg = f"prompt {index} holds half a surrogate pair, which is no text"
                    raise LLMError(msg)
                text, ids = prompt, self.tokenizer(prompt, verbose=False)["input_ids"]
            else:
                ids = _token_ids(prompt, self._prepared.definition.vocab_size, index)
                text = self.tokenizer.decode(ids)
            requests.append(Request(index=index, id=index, prompt=text, token_ids=tuple(ids)))
        return requests


def _token_ids(prompt: Any, vocab_size: int, index: int) -> list[int]:
    """The tokens of a prompt: a sequence of whole numbers, an array or a tensor."""
    found = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    is_sequence = isinstance(found, Iterable) and not isinstance(found, (str, bytes))
    tokens: list[Any] = list(found) if is_sequence else [None]
    if not all(isinstance(token, Integral) and 0 <= int(token) < vocab_size for token in tokens):
        msg = (
            f"prompt {index} must be a text or its token ids, whole numbers from 0 to "
            f"{vocab_size - 1}; got {str(prompt)[:40]}"
        )
        raise LLMError(msg)
    return [int(token) for token in tokens]


def _budget(kv_cache_tokens: int | None, kv_memory: str | int | None) -> KvBudget:
    if not isinstance(kv_memory, str):
        return KvBudget(tokens=kv_cache_tokens, num_bytes=kv_memory)
    budget = KvBudget.parse(kv_memory)
    return budget if kv_cache_tokens is None else replace(budget, tokens=kv_cache_tokens)


def _with_params(
    requests: list[Request], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[Request]:
    if params is None:
        return requests
    if isinstance(params, SamplingParams):
        params = [params] * len(requests)
    if len(params) != len(requests):
        msg = f"{len(requests)} prompts and {len(params)} sampling parameters; give one or as many"
        raise LLMError(msg)
    return [replace(request, params=own) for request, own in zip(requests, params, strict=True)]
