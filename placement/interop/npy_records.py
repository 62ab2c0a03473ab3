"""NumPy arrays: the paper's `[tokens, layers]` top-1 paths, whole traces, and loads.

* (tokens, layers) integers: the expert of each token and layer, as the paper's solver reads it;
* (tokens, layers, top_k) integers: all experts, by falling weight;
* (layers, experts) floating-point: loads (DeepSeek EPLB's and plumb's input).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from placement.interop.arrays import load_npy
from placement.interop.counts import trace_of_counts
from placement.interop.errors import RecordError
from placement.interop.trace_parts import Request, TraceParts
from placement.merging import merge_traces

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.interop.trace_parts import Phase
    from placement.trace import RoutingTrace

TOKENS_PER_SEQUENCE = 256

logger = logging.getLogger(__name__)


def read(paths: Sequence[Path], shape: ModelShape, *, phase: Phase = "all") -> RoutingTrace:
    """A trace of .npy files.

    The arrays do not say where a text ends: every 256 tokens count as a sequence.

    Raises:
        RecordError: naming the file.
    """
    if phase != "all":
        msg = f"an array does not tell prefill from decode; drop --phase {phase}"
        raise RecordError(msg)
    traces = [_read_one(path, shape) for path in paths]
    return merge_traces(traces) if len(traces) > 1 else traces[0]


def _read_one(path: Path, shape: ModelShape) -> RoutingTrace:
    array = load_npy(path)
    if np.issubdtype(array.dtype, np.floating):
        if array.ndim != 2:
            msg = f"{path}: loads have shape {array.shape}, expected (layers, experts)"
            raise RecordError(msg)
        return trace_of_counts(array.astype(np.float64), shape, source=path.name)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.size and shape.moe_layers is None:
        shape = shape.filled(moe_layers=tuple(range(array.shape[1])))
    parts = TraceParts(shape=shape, source=path.name)
    parts.add(Request(name=str(path), expert_ids=array))
    trace = parts.build()
    logger.info("%s: every %d tokens count as one sequence", path, TOKENS_PER_SEQUENCE)
    blocks = np.arange(trace.num_tokens, dtype=np.int32)
    return replace(
        trace,
        sequence_ids=blocks // TOKENS_PER_SEQUENCE,
        positions=blocks % TOKENS_PER_SEQUENCE,
        phase="unknown",
    )
