"""What a run counts: rows, bytes, messages and seconds, by phase and kind."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
RowKind = Literal["dispatch", "combine"]
ROW_KINDS: tuple[RowKind, ...] = ("dispatch", "combine")


class PhaseMetrics:
    """The counts of one rank in one phase.

    Attributes:
        rows: by kind, int64 (MoE layers, ranks): rows this rank sent to each other rank.
        num_bytes: bytes sent to other ranks, by kind.
        messages: collectives taken part in, by kind.
        seconds: time by section.
        steps: forward passes.
        tokens: tokens these passes started with on this rank.
    """

    def __init__(self, num_layers: int, num_ranks: int) -> None:
        self.rows = {kind: np.zeros((num_layers, num_ranks), dtype=np.int64) for kind in ROW_KINDS}
        self.num_bytes: dict[str, int] = defaultdict(int)
        self.messages: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self.tokens = 0
        self._last = 0.0

    def like(self) -> PhaseMetrics:
        """Nothing counted yet, for as many layers and ranks."""
        return PhaseMetrics(*next(iter(self.rows.values())).shape)

    def start(self, tokens: int) -> None:
        """A forward pass begins."""
        self.steps += 1
        self.tokens += tokens
        self.resume()

    def resume(self) -> None:
        """The next lap's time begins."""
        self._last = time.perf_counter()

    def lap(self, section: str) -> None:
        """The time since the last lap was spent in this section."""
        now = time.perf_counter()
        self.seconds[section] += now - self._last
        self._last = now

    def add_counts(self, other: PhaseMetrics) -> None:
        """Count rows, bytes and messages once more that were counted elsewhere."""
        for kind in ROW_KINDS:
            self.rows[kind] += other.rows[kind]
        for mine, more in ((self.num_bytes, other.num_bytes), (self.messages, other.messages)):
            for name, count in more.items():
                mine[name] += count

    def to_json(self) -> dict[str, Any]:
        """All counts of this rank as plain values."""
        return {
            "rows": {kind: rows.tolist() for kind, rows in self.rows.items()},
            "bytes": dict(self.num_bytes),
            "messages": dict(self.messages),
            "seconds": dict(self.seconds),
            "steps": self.steps,
            "tokens": self.tokens,
        }


def join_phases(by_rank: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One phase of the whole job from the `PhaseMetrics.to_json` of its ranks.

    Rows become (layer, source, destination); bytes and tokens are added; messages are those of the
    busiest rank, as each takes several ranks; seconds are means over the ranks.
    """
    return {
        "rows": {
            kind: np.array([rank["rows"][kind] for rank in by_rank]).transpose(1, 0, 2).tolist()
            for kind in ROW_KINDS
        },
        "bytes": _join(by_rank, "bytes", sum),
        "messages": _join(by_rank, "messages", max),
        "seconds": _join(by_rank, "seconds", lambda values: sum(values) / len(by_rank)),
        "steps": max(rank["steps"] for rank in by_rank),
        "tokens": sum(rank["tokens"] for rank in by_rank),
    }


def _join(by_rank: Sequence[dict[str, Any]], field: str, join: Any) -> dict[str, Any]:
    kinds = sorted({kind for rank in by_rank for kind in rank[field]})
    return {kind: join([rank[field].get(kind, 0) for rank in by_rank]) for kind in kinds}
