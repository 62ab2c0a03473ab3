"""vLLM: the routing it returns with `--enable-return-routed-experts`, and its recorded loads.

`routed_experts` is the base64 of a .npy file, (tokens - 1, decoder layers, top_k), uint8 up to 256
experts, else uint16, logical experts. Dense layers are there, as zeros. Loads are JSON Lines of
`eplb_load_stats` records (#41141).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.interop.counts import trace_of_counts
from placement.interop.errors import RecordError
from placement.interop.request_files import read_requests
from placement.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from placement.interop.model_shape import ModelShape
    from placement.interop.trace_parts import Phase
    from placement.trace import RoutingTrace

LOAD_RECORD = "eplb_load_stats"


def read(paths: Sequence[Path], shape: ModelShape, *, phase: Phase = "all") -> RoutingTrace:
    """A trace of vLLM's responses, or one that carries loads only.

    Raises:
        RecordError: naming the request.
    """
    if paths and _is_load_file(paths[0]):
        return trace_of_counts(_read_loads(paths), shape, source="vLLM eplb_load_stats")
    return read_requests(paths, shape, _decode, phase=phase, source="vLLM routed_experts")


def _decode(data: bytes, shape: ModelShape, name: str) -> NDArray[Any]:
    del shape
    try:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        msg = f"{name}: routed_experts is not a .npy array: {str(error).partition('. ')[0]}"
        raise RecordError(msg) from error


def _is_load_file(path: Path) -> bool:
    """Whether a load record is among the first lines (session records may come before)."""
    if path.suffix == ".npy" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return b'"record_type"' in head and b'"routed_experts"' not in head


def _read_loads(paths: Sequence[Path]) -> NDArray[np.float64]:
    """(MoE layers, experts) the sum over steps."""
    total: NDArray[np.float64] | None = None
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            load = _load_of(line, f"{path}, line {number}")
            if load is None:
                continue
            if total is not None and total.shape != load.shape:
                msg = f"{path}, line {number}: loads of shape {load.shape}, before {total.shape}"
                raise RecordError(msg)
            total = load if total is None else total + load
    if total is None:
        msg = f"no {LOAD_RECORD} record was found"
        raise RecordError(msg)
    return total


def _load_of(line: bytes, place: str) -> NDArray[np.float64] | None:
    try:
        record = parse_json(line) if line.strip() else {}
        if record.get("record_type") != LOAD_RECORD:
            return None
        load = np.array(record["expert_load"], dtype=np.float64)
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        msg = f"{place}: not a usable {LOAD_RECORD} record: {error!r}"
        raise RecordError(msg) from error
    if load.ndim != 2:
        msg = f"{place}: expert_load has shape {load.shape}, expected (layers, experts)"
        raise RecordError(msg)
    return load
