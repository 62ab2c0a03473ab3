"""RoutingTrace: the experts each token used, layer by layer (`exflow.trace/1`, a safetensors file)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from placement.errors import UserError
from placement.identity import UNKNOWN, ModelIdentity
from placement.json_text import parse_json
from placement.output import OutputError, replacing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FORMAT = "exflow.trace/1"
COUNTS = "counts"
"""Phase of a trace made from loads alone."""
MAX_EXPERTS = 1 << 15
MAX_WEIGHT = float(np.finfo(np.float16).max)
MAX_DOMAINS = 1 << 8
MAX_ID = (1 << 31) - 1
TOKEN_ARRAYS = {
    "positions": np.int32,
    "expert_weights": np.float16,
    "domain_ids": np.uint8,
    "foretold_ids": np.int16,
}
CHECK_CELLS = 1 << 22  # a trace of a million tokens is checked in pieces, not copied


class TraceError(UserError):
    """A routing trace that cannot be read or used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """The experts chosen by every token at every MoE layer.

    Attributes:
        expert_ids: int16 (tokens, layers, top_k), logical experts by falling gate weight.
        sequence_ids: int32 (tokens,), the document or request a token belongs to.
        num_experts: logical experts per layer.
        model: the model's name; a plan made from this trace carries it.
        layer_ids: the model's own index of each MoE layer.
        positions: int32 (tokens,), position of the token in its sequence.
        expert_weights: float16 (tokens, layers, top_k), gate weights.
        domain_ids: uint8 (tokens,), index into `domains`.
        foretold_ids: int16 (tokens, top_k), the experts that the first MoE layer chooses for the
            token where only the beginning of a text stands before it; they say where it starts a
            coherent decode step (`rules.first_owner`).
        domains: names of the domains (Pile subsets).
        phase: "teacher-forced", "prefill", "decode", "mixed", "unknown" or "counts".
        source: where the text came from.
        licence: its licence.
    """

    expert_ids: NDArray[np.int16]
    sequence_ids: NDArray[np.int32]
    num_experts: int
    model: str
    layer_ids: tuple[int, ...]
    positions: NDArray[np.int32] | None = None
    expert_weights: NDArray[np.float16] | None = None
    domain_ids: NDArray[np.uint8] | None = None
    foretold_ids: NDArray[np.int16] | None = None
    domains: tuple[str, ...] = field(default=())
    phase: str = "unknown"
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_ids", tuple(map(int, self.layer_ids)))
        if self.expert_ids.ndim != 3:
            msg = f"expert_ids must be (tokens, layers, top_k), got shape {self.expert_ids.shape}"
            raise TraceError(msg)
        if self.expert_ids.shape[0] == 0:
            msg = "the trace holds no tokens; profile more text"
            raise TraceError(msg)
        self._check_shapes()
        self._check_types()
        self._check_experts()
        self._check_domains()

    def _check_shapes(self) -> None:
        tokens, layers, top_k = self.expert_ids.shape
        if layers == 0 or len(self.layer_ids) != layers:
            msg = f"layer_ids names {len(self.layer_ids)} layers, expert_ids has {layers}"
            raise TraceError(msg)
        if self.num_experts > MAX_EXPERTS:
            msg = f"num_experts is {self.num_experts}, expected at most {MAX_EXPERTS}"
            raise TraceError(msg)
        if top_k == 0 or top_k > self.num_experts:
            msg = f"top_k is {top_k} with {self.num_experts} experts"
            raise TraceError(msg)
        expected = {
            "sequence_ids": (tokens,),
            "positions": (tokens,),
            "domain_ids": (tokens,),
            "expert_weights": (tokens, layers, top_k),
            "foretold_ids": (tokens, top_k),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                msg = f"{name} must have shape {shape}, got {array.shape}"
                raise TraceError(msg)

    def _check_types(self) -> None:
        """Wider types than a file's are taken if their values fit it."""
        for name, dtype in {
            "expert_ids": np.int16,
            "sequence_ids": np.int32,
            **TOKEN_ARRAYS,
        }.items():
            array = getattr(self, name)
            kind = np.floating if name == "expert_weights" else np.integer
            if array is not None and not np.issubdtype(array.dtype, kind):
                msg = f"{name} must be {np.dtype(dtype)}, got {array.dtype}"
                raise TraceError(msg)
        most_of = {"sequence_ids": MAX_ID, "positions": MAX_ID, "domain_ids": MAX_DOMAINS - 1}
        for name, most in most_of.items():
            array = getattr(self, name)
            if array is not None and (array.min() < 0 or array.max() > most):
                msg = f"{name} run from {array.min()} to {array.max()}, expected 0 to {most}"
                raise TraceError(msg)

    def _check_experts(self) -> None:
        self._check_ids("expert", self.expert_ids, self.layer_ids)
        if self.foretold_ids is not None:
            self._check_ids("foretold", self.foretold_ids[:, None], self.layer_ids[:1])
        if self.expert_weights is not None and not np.isfinite(self.expert_weights).all():
            msg = "expert_weights holds NaN or infinite values"
            raise TraceError(msg)
        if self.expert_weights is not None and np.abs(self.expert_weights).max() > MAX_WEIGHT:
            msg = f"expert_weights reach beyond {MAX_WEIGHT}, the most that a file's float16 holds"
            raise TraceError(msg)

    def _check_ids(self, name: str, ids: NDArray[np.int16], layer_ids: tuple[int, ...]) -> None:
        """Of (tokens, layers, top_k) experts."""
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.num_experts:
            msg = f"{name} ids run from {low} to {high}, expected 0 to {self.num_experts - 1}"
            raise TraceError(msg)
        step = max(1, CHECK_CELLS // (len(layer_ids) * self.top_k))
        for start in range(0, self.num_tokens if self.top_k > 1 else 0, step):
            ordered = np.sort(ids[start : start + step], axis=2)
            twice = np.argwhere((ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2))
            if len(twice):
                token, layer = start + int(twice[0, 0]), layer_ids[int(twice[0, 1])]
                msg = f"token {token} names an expert twice at layer {layer} ({name} ids)"
                raise TraceError(msg)

    def _check_domains(self) -> None:
        if self.domain_ids is not None and int(self.domain_ids.max()) >= len(self.domains):
            msg = f"domain_ids reach {int(self.domain_ids.max())}, {len(self.domains)} are named"
            raise TraceError(msg)

    @property
    def identity(self) -> ModelIdentity:
        """The model it is of."""
        return ModelIdentity(
            model=self.model, num_experts=self.num_experts, layer_ids=self.layer_ids
        )

    def difference(
        self, other: RoutingTrace, *, names: tuple[str, str] = ("one", "another")
    ) -> str | None:
        """What tells the models of two traces apart; None if they are of the same."""
        found = self.identity.difference(other.identity, names=names)
        if found is None and self.top_k != other.top_k:
            found = f"top_k is {self.top_k} in {names[0]}, {other.top_k} in {names[1]}"
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens in the trace."""
        return int(self.expert_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts a token uses at a layer."""
        return int(self.expert_ids.shape[2])

    @property
    def num_sequences(self) -> int:
        """Distinct sequences."""
        return len(np.unique(self.sequence_ids))

    def select(self, tokens: NDArray[Any]) -> RoutingTrace:
        """The tokens picked by a mask or by indices, in that order."""
        picked: dict[str, Any] = {
            name: None if (array := getattr(self, name)) is None else array[tokens]
            for name in TOKEN_ARRAYS
        }
        return replace(
            self,
            expert_ids=self.expert_ids[tokens],
            sequence_ids=self.sequence_ids[tokens],
            **picked,
        )

    def split(self, seed: int = 0) -> tuple[RoutingTrace, RoutingTrace]:
        """Two halves by sequence: one to fit a plan, one to measure it.

        The unique sequence ids are shuffled by `default_rng(seed)`; the first half fits.

        Raises:
            TraceError: with fewer than two sequences.
        """
        sequences = np.unique(self.sequence_ids)
        if len(sequences) < 2:
            msg = "a split needs at least two sequences, the trace has one; profile more documents"
            raise TraceError(msg)
        np.random.default_rng(seed).shuffle(sequences)
        fits = np.isin(self.sequence_ids, sequences[: len(sequences) // 2])
        return self.select(fits), self.select(~fits)

    def top1(self) -> RoutingTrace:
        """Only the first expert of each token and layer: the paper's path."""
        weights, foretold = self.expert_weights, self.foretold_ids
        return replace(
            self,
            expert_ids=self.expert_ids[:, :, :1],
            expert_weights=None if weights is None else weights[:, :, :1],
            foretold_ids=None if foretold is None else foretold[:, :1],
        )

    def domain(self, name: str) -> RoutingTrace:
        """The tokens of one domain.

        Raises:
            TraceError: if the trace does not name that domain.
        """
        if self.domain_ids is None or name not in self.domains:
            known = ", ".join(self.domains) or "none"
            msg = f"the trace has no domain {name!r}; it names: {known}"
            raise TraceError(msg)
        return self.select(self.domain_ids == self.domains.index(name))

    def shuffled_layers(self, seed: int = 0) -> RoutingTrace:
        """The null: tokens permuted independently in each layer, so that only load is left."""
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(self.num_tokens) for _ in range(self.num_layers)]
        ids = np.stack([self.expert_ids[order, i] for i, order in enumerate(orders)], axis=1)
        return replace(self, expert_ids=ids, expert_weights=None, foretold_ids=None)

    def save(self, path: str | Path) -> None:
        """Write `exflow.trace/1`.

        Raises:
            OutputError: if it cannot be written.
        """
        tensors: dict[str, NDArray[Any]] = {
            "expert_ids": np.ascontiguousarray(self.expert_ids, dtype=np.int16),
            "sequence_ids": np.ascontiguousarray(self.sequence_ids, dtype=np.int32),
        }
        for name, dtype in TOKEN_ARRAYS.items():
            if getattr(self, name) is not None:
                tensors[name] = np.ascontiguousarray(getattr(self, name), dtype=dtype)
        metadata = {
            "format": FORMAT,
            "model": self.model,
            "num_experts": str(self.num_experts),
            "layer_ids": json.dumps(list(self.layer_ids)),
            "phase": self.phase,
            "domains": json.dumps(list(self.domains)),
            "source": self.source,
            "licence": self.licence,
        }
        try:
            with replacing(Path(path)) as partial:
                save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:
            msg = f"{path}: cannot be written: {error}; name another file"
            raise OutputError(msg) from error

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read `exflow.trace/1`.

        Raises:
            TraceError: naming the file and what is wrong with it.
        """
        if not Path(path).is_file():
            msg = f"{path}: no such trace; record one with `exflow profile MODEL CORPUS -o {path}`"
            raise TraceError(msg)
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**_fields(metadata, tensors))
        except (SafetensorError, TraceError, KeyError, TypeError, ValueError) as error:
            msg = f"{path}: not a usable routing trace: {error}"
            raise TraceError(msg) from error


def _fields(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        msg = f"format is {metadata.get('format')!r}, expected {FORMAT!r}"
        raise TraceError(msg)
    missing = {"expert_ids", "sequence_ids"} - set(tensors)
    if missing:
        msg = f"tensors missing: {', '.join(sorted(missing))}"
        raise TraceError(msg)
    layer_ids = parse_json(metadata["layer_ids"])
    if not isinstance(layer_ids, list) or not all(type(layer) is int for layer in layer_ids):
        msg = f"layer_ids must list whole numbers, got {metadata['layer_ids']:.40}"
        raise TraceError(msg)
    return {
        "expert_ids": tensors["expert_ids"],
        "sequence_ids": tensors["sequence_ids"],
        **{name: tensors.get(name) for name in TOKEN_ARRAYS},
        "num_experts": int(metadata["num_experts"]),
        "model": metadata.get("model", UNKNOWN),
        "layer_ids": tuple(layer_ids),
        "domains": tuple(parse_json(metadata.get("domains", "[]"))),
        "phase": metadata.get("phase", "unknown"),
        "source": metadata.get("source", ""),
        "licence": metadata.get("licence", ""),
    }
