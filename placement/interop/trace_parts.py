"""TraceParts: a routing trace put together from the requests of a recording.

Every request is checked on its own, so that an error can name it; parts are kept in the narrow
type they came in and widened once, into the arrays of the trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from placement.interop.errors import RecordError
from placement.json_text import can_encode
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.interop.model_shape import ModelShape

Phase = Literal["all", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("all", "prefill", "decode")
CHECK_CELLS = 1 << 22
MAX_POSITION = 1 << 30
MAX_DOMAINS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The routing of one request.

    Attributes:
        name: says in an error which request it is.
        expert_ids: (tokens, layers, top_k), any integer type; all decoder layers or the MoE layers.
        start: position of the first token in its sequence.
        prompt_tokens: tokens of the prompt; None if unknown.
        model: the model's name; empty if unknown.
        domain: name of the text's domain; empty if unknown.
    """

    name: str
    expert_ids: NDArray[Any]
    start: int = 0
    prompt_tokens: int | None = None
    model: str = ""
    domain: str = ""

    def __post_init__(self) -> None:
        for what, number in (
            ("routed_experts_start", self.start),
            ("prompt_tokens", self.prompt_tokens),
        ):
            if number is not None and not (type(number) is int and 0 <= number < MAX_POSITION):
                msg = f"{self.name}: {what} must be a whole number of tokens, got {number!r:.40}"
                raise RecordError(msg)
        for what, text in (("model", self.model), ("domain", self.domain)):
            if not isinstance(text, str) or not can_encode(text):
                msg = f"{self.name}: {what} must be text, got {text!r:.40}"
                raise RecordError(msg)


@dataclass(kw_only=True)
class TraceParts:
    """Requests gathered so far.

    Attributes:
        shape: what is known of the model.
        phase: which tokens to keep.
        source: written into the trace.
    """

    shape: ModelShape
    phase: Phase = "all"
    source: str = ""
    model: str = ""
    first_name: str = ""
    top_k: int = 0
    layer_ids: tuple[int, ...] = ()
    ids: list[NDArray[Any]] = field(default_factory=list)
    positions: list[NDArray[np.int32]] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)

    def add(self, request: Request) -> None:
        """Check a request and keep its tokens.

        Raises:
            RecordError: naming the request.
        """
        self._check_model(request)
        if request.expert_ids.ndim != 3 or 0 in request.expert_ids.shape[1:]:
            msg = f"{request.name}: routed experts have shape {request.expert_ids.shape}, expected "
            raise RecordError(msg + "(tokens, layers, top_k)")
        if not np.issubdtype(request.expert_ids.dtype, np.integer):
            msg = f"{request.name}: routed experts are {request.expert_ids.dtype}, not integers"
            raise RecordError(msg)
        kept = self._of_phase(request)
        experts = request.expert_ids[kept]
        if not len(experts):
            return
        if not self.layer_ids:
            self._settle_layers(request)
        experts = self._moe_layers(request, experts)
        _check_experts(request.name, experts, self.shape.need_experts())
        self.ids.append(experts)
        start = request.start + kept.start
        self.positions.append(np.arange(start, start + len(experts), dtype=np.int32))
        self.domains.append(request.domain)

    def build(self) -> RoutingTrace:
        """The trace of all requests; a request is a sequence.

        Raises:
            RecordError: if no request had tokens.
        """
        if not self.ids:
            msg = f"no routed experts were found (phase {self.phase})"
            raise RecordError(msg)
        lengths = [len(part) for part in self.ids]
        sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        names = tuple(dict.fromkeys(self.domains))
        domain_ids = None
        if len(names) > MAX_DOMAINS:
            msg = f"{len(names)} domains, a trace tells at most {MAX_DOMAINS} apart; record fewer"
            raise RecordError(msg)
        if any(names):
            of_request = np.array([names.index(name) for name in self.domains], dtype=np.uint8)
            domain_ids = np.repeat(of_request, lengths)
        return RoutingTrace(
            expert_ids=self._join(sum(lengths)),
            sequence_ids=sequences,
            positions=np.concatenate(self.positions),
            domain_ids=domain_ids,
            domains=tuple(name or "unknown" for name in names) if domain_ids is not None else (),
            num_experts=self.shape.need_experts(),
            model=self.shape.model or self.model or "unknown",
            layer_ids=self.layer_ids,
            phase={"all": "mixed"}.get(self.phase, self.phase),
            source=self.source,
        )

    def _join(self, tokens: int) -> NDArray[np.int16]:
        joined = np.empty((tokens, len(self.layer_ids), self.top_k), dtype=np.int16)
        end = tokens
        while self.ids:  # from the end, so that each part is freed when it has been copied
            part = self.ids.pop()
            joined[end - len(part) : end] = part
            end -= len(part)
        return joined

    def _check_model(self, request: Request) -> None:
        if not self.first_name:
            self.first_name = request.name
        if not request.model:
            return
        if self.model and self.model != request.model:
            msg = (
                f"{request.name} is of model {request.model}, those before of {self.model}; "
                f"import one model at a time"
            )
            raise RecordError(msg)
        self.model = request.model

    def _of_phase(self, request: Request) -> slice:
        """The rows of the wanted phase: row i is position start + i; prompt tokens are prefill."""
        if self.phase == "all":
            return slice(0, None)
        if request.prompt_tokens is None:
            msg = f"{request.name} does not tell its prompt tokens, needed for {self.phase} only"
            raise RecordError(msg)
        border = max(0, request.prompt_tokens - request.start)
        return slice(0, border) if self.phase == "prefill" else slice(border, None)

    def _settle_layers(self, request: Request) -> None:
        """Which rows of the first request are MoE layers; later ones must look alike."""
        _, rows, self.top_k = request.expert_ids.shape
        if self.shape.top_k is not None and self.top_k != self.shape.top_k:
            msg = f"{request.name}: {self.top_k} experts a token, the model uses {self.shape.top_k}"
            raise RecordError(msg)
        known, in_all = self.shape.moe_layers, self.shape.num_layers
        if rows not in {len(known or ()), in_all} and (known or in_all):
            said = f"{request.name}: {rows} layers, expected "
            expected = [f"all {in_all}"] if in_all else []
            expected += [f"the {len(known)} with experts"] if known else []
            hint = "" if in_all else "; give --num-layers if there are dense layers too"
            raise RecordError(said + " or ".join(expected) + hint)
        self.layer_ids = known if known is not None else _used_layers(request)

    def _moe_layers(self, request: Request, experts: NDArray[Any]) -> NDArray[Any]:
        _, rows, top_k = experts.shape
        if top_k != self.top_k:
            msg = f"{request.name}: {top_k} experts a token, those before {self.top_k}"
            raise RecordError(msg)
        if rows == len(self.layer_ids):
            return experts
        if rows <= max(self.layer_ids):
            msg = f"{request.name}: {rows} layers, too few for MoE layer {max(self.layer_ids)}"
            raise RecordError(msg)
        return experts[:, list(self.layer_ids)]


def _used_layers(request: Request) -> tuple[int, ...]:
    """Without a config: a layer whose rows all name one expert top_k times is dense."""
    experts = request.expert_ids
    if experts.shape[2] == 1:
        msg = (
            f"{request.name}: with one expert a token, dense layers cannot be told from MoE layers; "
            f"give --config path/to/config.json or --moe-layers"
        )
        raise RecordError(msg)
    is_dense = (experts == experts[:, :, :1]).all(axis=(0, 2))
    if is_dense.all():
        msg = f"{request.name}: every layer names one expert {experts.shape[2]} times; none is MoE"
        raise RecordError(msg)
    return tuple(int(layer) for layer in np.flatnonzero(~is_dense))


def _check_experts(name: str, experts: NDArray[Any], num_experts: int) -> None:
    low, high = int(experts.min()), int(experts.max())
    if low < 0 or high >= num_experts:
        msg = f"{name}: expert ids run from {low} to {high}, expected 0 to {num_experts - 1}"
        raise RecordError(msg)
    step = max(1, CHECK_CELLS // (experts.shape[1] * experts.shape[2]))
    for start in range(0, len(experts), step):
        ordered = np.sort(experts[start : start + step], axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
        if twice.any():
            token, layer = (int(x) for x in np.argwhere(twice)[0])
            msg = f"{name}: token {start + token} names an expert twice in MoE layer number {layer}"
            raise RecordError(msg)
