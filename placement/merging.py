"""Several traces of one model as one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.identity import UNKNOWN
from placement.trace import COUNTS, MAX_DOMAINS, MAX_ID, TraceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from placement.trace import RoutingTrace


def merge_traces(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace of several, with sequence ids made disjoint and domains matched by name.

    Optional arrays are kept only where every trace has them.

    Raises:
        TraceError: if the traces come from different models.
    """
    if not traces:
        msg = "no traces to merge"
        raise TraceError(msg)
    first = next((trace for trace in traces if trace.model != UNKNOWN), traces[0])
    for other in traces:
        difference = first.difference(other)
        if difference is not None:
            msg = f"traces of different models cannot be merged: {difference}"
            raise TraceError(msg)
    domains = tuple(dict.fromkeys(name for trace in traces for name in trace.domains))
    return replace(
        first,
        expert_ids=np.concatenate([trace.expert_ids for trace in traces]),
        sequence_ids=_disjoint_sequences(traces),
        positions=_joined(traces, "positions"),
        expert_weights=_joined(traces, "expert_weights"),
        domain_ids=_joined_domains(traces, domains),
        foretold_ids=_joined(traces, "foretold_ids"),
        domains=domains,
        phase=_joined_phase(traces),
        source="; ".join(dict.fromkeys(trace.source for trace in traces if trace.source)),
        licence="; ".join(dict.fromkeys(trace.licence for trace in traces if trace.licence)),
    )


def _disjoint_sequences(traces: Sequence[RoutingTrace]) -> NDArray[np.int32]:
    parts, offset = [], 0
    for trace in traces:
        parts.append(trace.sequence_ids.astype(np.int64) + offset)
        offset += int(trace.sequence_ids.max()) + 1
    if offset - 1 > MAX_ID:
        msg = (
            f"one trace after the other, sequence_ids reach {offset - 1}, expected at most "
            f"{MAX_ID}; number the sequences of each trace from 0"
        )
        raise TraceError(msg)
    return np.concatenate(parts).astype(np.int32)


def _joined_phase(traces: Sequence[RoutingTrace]) -> str:
    """Loads alone among others still say nothing of affinity."""
    phases = {trace.phase for trace in traces}
    if COUNTS in phases:
        return COUNTS
    return phases.pop() if len(phases) == 1 else "mixed"


def _joined(traces: Sequence[RoutingTrace], name: str) -> NDArray[Any] | None:
    arrays = [getattr(trace, name) for trace in traces]
    return None if any(array is None for array in arrays) else np.concatenate(arrays)


def _joined_domains(
    traces: Sequence[RoutingTrace], domains: tuple[str, ...]
) -> NDArray[np.uint8] | None:
    parts = []
    if any(trace.domain_ids is None for trace in traces):
        return None
    if len(domains) > MAX_DOMAINS:
        msg = f"the traces name {len(domains)} domains, expected at most {MAX_DOMAINS} in all"
        raise TraceError(msg)
    for trace in traces:
        renumber = np.array([domains.index(name) for name in trace.domains], dtype=np.uint8)
        parts.append(renumber[trace.domain_ids])
    return np.concatenate(parts)
