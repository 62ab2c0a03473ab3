"""SGLang: routing returned with a response, and the dumps of its expert distribution recorder.

* Responses: `routed_experts` is the base64 of raw int32, (tokens - 1, decoder layers, top_k),
  logical experts; the shape is not told and comes from the model's config.
* `stat` dumps: `logical_count` (steps, layers, experts): loads only.
* `per_token` dumps, one a rank: `records`, each a forward pass with `topk_ids_of_layer` (layers,
  tokens, 8), *physical* experts, -1 where there is none; `last_physical_to_logical_map` turns them
  into logical experts as long as no rebalancing happened while recording.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.interop.counts import trace_of_counts
from placement.interop.errors import RecordError
from placement.interop.request_files import read_requests
from placement.interop.torch_file import load_pt
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from placement.interop.model_shape import ModelShape
    from placement.interop.trace_parts import Phase

logger = logging.getLogger(__name__)


def read(paths: Sequence[Path], shape: ModelShape, *, phase: Phase = "all") -> RoutingTrace:
    """A trace of SGLang's responses or `.pt` dumps.

    Raises:
        RecordError: naming the request or the file.
    """
    if any(path.suffix == ".pt" for path in paths):
        return _read_dumps(paths, shape, phase)
    return read_requests(paths, shape, _decode, phase=phase, source="SGLang routed_experts")


def _decode(data: bytes, shape: ModelShape, name: str) -> NDArray[Any]:
    layers, top_k = shape.need_layers(), shape.need_top_k()
    if len(data) % (4 * layers * top_k):
        msg = (
            f"{name}: {len(data)} bytes of routed experts are no whole number of tokens of "
            f"{layers} layers x {top_k} experts x 4 bytes; is this the right config.json?"
        )
        raise RecordError(msg)
    return np.frombuffer(data, dtype="<i4").reshape(-1, layers, top_k)


def _read_dumps(paths: Sequence[Path], shape: ModelShape, phase: Phase) -> RoutingTrace:
    dumps = [(path, load_pt(path)) for path in paths]
    if all("logical_count" in dump for _, dump in dumps):
        counts = sum(_logical_count(path, dump) for path, dump in dumps)
        return trace_of_counts(np.asarray(counts), shape, source="SGLang recorder, mode stat")
    walk = _Passes(phase=phase)
    for path, dump in dumps:
        walk.add_dump(path, dump)
    return walk.build(shape)


def _logical_count(path: Path, dump: dict[str, Any]) -> NDArray[np.float64]:
    counts = np.asarray(dump["logical_count"], dtype=np.float64)
    if counts.ndim not in {2, 3}:
        msg = f"{path}: logical_count has shape {counts.shape}, expected (steps, layers, experts)"
        raise RecordError(msg)
    return counts.sum(axis=0) if counts.ndim == 3 else counts


@dataclass(kw_only=True)
class _Passes:
    """Forward passes gathered from the dumps of all ranks."""

    phase: Phase
    ids: list[NDArray[np.int16]] = field(default_factory=list)
    positions: list[NDArray[np.int32]] = field(default_factory=list)
    sequences: list[NDArray[np.int32]] = field(default_factory=list)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    next_sequence: int = 0

    def add_dump(self, path: Path, dump: dict[str, Any]) -> None:
        """All passes of one rank; a rank that repeats another's passes (tensor parallel) is skipped."""
        if "records" not in dump or "last_physical_to_logical_map" not in dump:
            msg = f"{path}: neither a `stat` dump (logical_count) nor a `per_token` dump (records)"
            raise RecordError(msg)
        running: list[tuple[int, int]] = []
        for number, record in enumerate(dump["records"]):
            place = f"{path}, pass {number}"
            if "topk_ids_of_layer" not in record:
                msg = f"{place}: no topk_ids_of_layer; record with mode per_token, not per_pass"
                raise RecordError(msg)
            key = (record.get("forward_pass_id"), tuple(record["input_ids"]))
            if key in self.seen and len(record["input_ids"]) > 1:
                logger.info("%s repeats a pass of another rank; skipped", place)
                continue
            self.seen.add(key)
            running = self._add_pass(place, record, dump["last_physical_to_logical_map"], running)

    def _add_pass(
        self,
        place: str,
        record: dict[str, Any],
        logical: NDArray[Any],
        running: list[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        positions = np.asarray(record["positions"], dtype=np.int32)
        is_prefill = record.get("extend_seq_lens") is not None
        lengths = (
            [int(n) for n in record["extend_seq_lens"]] if is_prefill else [1] * len(positions)
        )
        experts = _to_logical(np.asarray(record["topk_ids_of_layer"]), logical, place)
        if sum(lengths) != len(positions) or len(experts) != len(positions):
            msg = (
                f"{place}: {len(positions)} positions, {len(experts)} tokens routed, lengths that "
                f"sum to {sum(lengths)}"
            )
            raise RecordError(msg)
        ends = np.cumsum(lengths)
        followed = self._follow(positions[ends - lengths].tolist(), running)
        if self.phase in {"all", "prefill" if is_prefill else "decode"}:
            self.ids.append(experts)
            self.positions.append(positions)
            self.sequences.append(np.repeat(np.array(followed, dtype=np.int32), lengths))
        now = list(zip(followed, positions[ends - 1].tolist(), strict=True))
        return [seq for seq in running if seq[0] not in followed] + now if is_prefill else now

    def _follow(self, positions: list[int], running: list[tuple[int, int]]) -> list[int]:
        """Sequences of a pass: the dump names no request, but a batch keeps its order.

        A piece that starts at a position follows the next running sequence that ended one before.
        """
        sequences, place = [], 0
        for position in positions:
            matches = (i for i in range(place, len(running)) if running[i][1] + 1 == position)
            found = next(matches, None)
            if found is None:
                sequences.append(self.next_sequence)
                self.next_sequence += 1
            else:
                sequences.append(running[found][0])
                place = found + 1
        return sequences

    def build(self, shape: ModelShape) -> RoutingTrace:
        """The trace of all passes; layers without experts are left out."""
        if not self.ids:
            msg = f"the dumps hold no forward pass of phase {self.phase}"
            raise RecordError(msg)
        ids = np.concatenate(self.ids)
        layers = tuple(int(i) for i in np.flatnonzero((ids >= 0).any(axis=(0, 2))))
        if shape.moe_layers is not None and layers != shape.moe_layers:
            msg = f"experts were recorded at layers {layers}, the model has them at {shape.moe_layers}"
            raise RecordError(msg)
        ids = ids[:, list(layers)]
        ids = ids[:, :, (ids >= 0).any(axis=(0, 1))]
        real = (ids >= 0).all(axis=(1, 2))  # a padded token has no experts
        return RoutingTrace(
            expert_ids=ids[real],
            sequence_ids=np.concatenate(self.sequences)[real],
            positions=np.concatenate(self.positions)[real],
            num_experts=shape.need_experts(),
            model=shape.model or "unknown",
            layer_ids=layers,
            phase={"all": "mixed"}.get(self.phase, self.phase),
            source="SGLang recorder, mode per_token",
        )


def _to_logical(physical: NDArray[Any], logical: NDArray[Any], place: str) -> NDArray[np.int16]:
    """(tokens, layers, 8) logical experts, -1 where there is none."""
    if physical.ndim != 3 or len(physical) != len(logical):
        msg = f"{place}: topk_ids_of_layer has shape {physical.shape} for {len(logical)} layers"
        raise RecordError(msg)
    if physical.max(initial=-1) >= logical.shape[1]:
        msg = f"{place}: physical expert {physical.max()}, the map has {logical.shape[1]} slots"
        raise RecordError(msg)
    translated = np.take_along_axis(
        logical, np.maximum(physical, 0).reshape(len(physical), -1), axis=1
    ).reshape(physical.shape)
    return np.where(physical >= 0, translated, -1).astype(np.int16).transpose(1, 0, 2)
