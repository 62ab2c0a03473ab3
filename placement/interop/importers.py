"""Importers: recorded routing of an engine to a RoutingTrace."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from placement.interop.errors import ConfigError, RecordError
from placement.trace import COUNTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.interop.trace_parts import Phase
    from placement.trace import RoutingTrace

# Each module has `read(paths, shape, phase=...)`; it is imported when its name is asked for.
IMPORTERS = {
    "vllm": "placement.interop.vllm_records",
    "sglang": "placement.interop.sglang_records",
    "trtllm": "placement.interop.trtllm_records",
    "hf": "placement.interop.hf_records",
    "npy": "placement.interop.npy_records",
}


def read_trace(
    engine: str, paths: Sequence[Path], shape: ModelShape, *, phase: Phase = "all"
) -> RoutingTrace:
    """A routing trace of an engine's files.

    Raises:
        RecordError: for an unknown engine, a missing file, or a file that cannot be used, also
            because it contradicts `shape`, or neither tells what is needed.
    """
    if engine not in IMPORTERS:
        msg = f"unknown engine {engine!r}; choose one of {', '.join(IMPORTERS)}"
        raise RecordError(msg)
    missing = [str(path) for path in paths if not path.exists()]
    if missing or not paths:
        msg = f"no such file: {', '.join(missing) or 'none was given'}"
        raise RecordError(msg)
    try:
        trace: RoutingTrace = import_module(IMPORTERS[engine]).read(paths, shape, phase=phase)
        shape.filled(
            num_experts=trace.num_experts,
            top_k=None if trace.phase == COUNTS else trace.top_k,
            moe_layers=trace.layer_ids,
        )
    except ConfigError as error:
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        msg = f"{paths[0]}{others}: {error}"
        raise RecordError(msg) from error
    return trace
