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

from placement.interop.arrays import whole_numbers
from placement.interop.counts import trace_of_counts
from placement.interop.errors import RecordError
from placement.interop.request_files import read_requests
from placement.interop.torch_file import load_pt
from placement.trace import MAX_EXPERTS, RoutingTrace

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
        counts = [_logical_count(path, dump) for path, dump in dumps]
        if len({count.shape for count in counts}) > 1:
            msg = f"the dumps count {' and '.join(str(count.shape) for count in counts)} experts"
            raise RecordError(msg)
        return trace_of_counts(
            sum(counts[1:], counts[0]), shape, source="SGLang recorder, mode stat"
        )
    walk = _Passes(phase=phase)
    for path, dump in dumps:
        walk.add_dump(path, dump)
    return walk.build(shape)


def _logical_count(path: Path, dump: dict[str, Any]) -> NDArray[np.float64]:
    counts = dump["logical_count"]
    if (
        not isinstance(counts, np.ndarray)
        or counts.ndim not in {2, 3}
        or counts.dtype.kind not in "iuf"
    ):
        msg = f"{path}: logical_count must be a tensor of loads, (steps, layers, experts)"
        raise RecordError(msg)
    loads = counts.astype(np.float64)
    return loads.sum(axis=0) if counts.ndim == 3 else loads


def _records(path: Path, records: Any) -> list[dict[str, Any]]:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        msg = f"{path}: records must be a list of forward passes"
        raise RecordError(msg)
    return records


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
        what = f"{path}: last_physical_to_logical_map"
        logical = whole_numbers(
            dump["last_physical_to_logical_map"], what, ndim=2, stop=MAX_EXPERTS
        )
        running: list[tuple[int, int]] = []
        for number, record in enumerate(_records(path, dump["records"])):
            place = f"{path}, pass {number}"
            if "topk_ids_of_layer" not in record:
                msg = f"{place}: no topk_ids_of_layer; record with mode per_token, not per_pass"
                raise RecordError(msg)
            tokens = whole_numbers(record.get("input_ids"), f"{place}: input_ids").tolist()
            key = (str(record.get("forward_pass_id")), *tokens)
            if key in self.seen and len(tokens) > 1:
                logger.info("%s repeats a pass of another rank; skipped", place)
                continue
            self.seen.add(key)
            running = self._add_pass(place, record, logical, running)

    def _add_pass(
        self,
        place: str,
        record: dict[str, Any],
        logical: NDArray[Any],
        running: list[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        positions = whole_numbers(record.get("positions"), f"{place}: positions", stop=1 << 31)
        given = record.get("extend_seq_lens")
        is_prefill = given is not None
        lengths = np.ones(len(positions), dtype=np.int64)
        if is_prefill:
            lengths = whole_numbers(given, f"{place}: extend_seq_lens", stop=1 << 31)
            lengths = lengths[lengths > 0]  # an idle rank has pieces without tokens
        chosen = whole_numbers(record["topk_ids_of_layer"], f"{place}: topk_ids_of_layer", ndim=3)
        experts = _to_logical(chosen, logical, place)
        if lengths.sum() != len(positions) or len(experts) != len(positions):
            msg = (
                f"{place}: {len(positions)} positions, {len(experts)} tokens routed, lengths that "
                f"sum to {lengths.sum()}"
            )
            raise RecordError(msg)
        if self.ids and self.ids[0].shape[1:] != experts.shape[1:]:
            msg = f"{place}: {experts.shape[1:]} layers and experts, before {self.ids[0].shape[1:]}"
            raise RecordError(msg)
        if not len(positions):
            return running
        ends = np.cumsum(lengths)
        followed = self._follow(positions[ends - lengths].tolist(), running)
        if self.phase in {"all", "prefill" if is_prefill else "decode"}:
            self.ids.append(experts)
            self.positions.append(positions.astype(np.int32))
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
        if shape.num_layers not in {None, ids.shape[1]}:
            msg = f"the dumps are of {ids.shape[1]} layers, the model has {shape.num_layers}"
            raise RecordError(msg)
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
    if len(physical) != len(logical):
        msg = f"{place}: topk_ids_of_layer has shape {physical.shape} for {len(logical)} layers"
        raise RecordError(msg)
    if physical.max(initial=-1) >= logical.shape[1]:
        msg = f"{place}: physical expert {physical.max()}, the map has {logical.shape[1]} slots"
        raise RecordError(msg)
    translated = np.take_along_axis(
        logical, np.maximum(physical, 0).reshape(len(physical), -1), axis=1
    ).reshape(physical.shape)
    return np.where(physical >= 0, translated, -1).astype(np.int16).transpose(1, 0, 2)
