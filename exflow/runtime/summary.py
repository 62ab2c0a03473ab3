"""metrics.json: what a job did, and whether the planner's count agrees."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from exflow.runtime.metrics import PHASES, ROW_KINDS, join_phases
from placement.traffic import count_traffic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from exflow.runtime.metrics import Phase, PhaseMetrics
    from exflow.runtime.model import PreparedModel
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.requests import Completion
    from placement.trace import RoutingTrace
    from placement.traffic import Dispatch

FORMAT = "exflow.metrics/1"


class Clock:
    """Seconds of the parts of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """What has passed since the last lap was this part."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now


def summarize(
    prepared: PreparedModel,
    ranks: Ranks,
    metrics: Mapping[Phase, PhaseMetrics],
    completions: Sequence[Completion],
    trace: RoutingTrace | None,
    *,
    num_prompts: int,
    seconds: Mapping[str, float],
    bytes_read: int,
) -> dict[str, Any]:
    """Gather the counts of all ranks; every rank must call it.

    Args:
        prepared: the model, the plan and the options.
        ranks: this rank.
        metrics: its counts.
        completions: all completions.
        trace: the routing of all decode steps; None if there were none.
        num_prompts: prompts of the job, finished earlier or now.
        seconds: by part of the job.
        bytes_read: bytes of weights this rank read.
    """
    mine = {phase: metrics[phase].to_json() for phase in PHASES}
    by_rank = ranks.gather({"phases": mine, "bytes_read": bytes_read}, prepared.device)
    phases = {phase: join_phases([rank["phases"][phase] for rank in by_rank]) for phase in PHASES}
    generated = sum(len(completion.token_ids) for completion in completions)
    refused = sum(completion.finish_reason == "refused" for completion in completions)
    predicted = _predict(prepared, trace)
    decode = phases["decode"]
    return {
        "format": FORMAT,
        "model": prepared.definition.name,
        "strategy": prepared.plan.strategy.name,
        "protocol": prepared.engine.protocol,
        "coherence_domain": prepared.engine.domain_size or ranks.num_ranks,
        "dispatch": _dispatch(prepared),
        "prefill_dispatch": prepared.engine.prefill_dispatch,
        "world_size": ranks.num_ranks,
        "batch_size": prepared.engine.batch_size,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "device": prepared.device.type,
        "requests": {
            "finished": len(completions) - refused,
            "refused": refused,
            "skipped": num_prompts - len(completions),
        },
        "tokens": {"prompt": phases["prefill"]["tokens"], "generated": generated},
        "seconds": dict(seconds),
        "tokens_per_second": generated / seconds["generate"],
        "bytes_read": [rank["bytes_read"] for rank in by_rank],
        "phases": phases,
        "rows_per_token": _rows_per_token(decode),
        "predicted": predicted,
        "measured_equals_predicted": all(
            np.array_equal(decode["rows"][kind], predicted[kind]) for kind in ROW_KINDS
        ),
    }


def _dispatch(prepared: PreparedModel) -> Dispatch:
    dispatch = prepared.engine.dispatch
    return "flat" if dispatch == "auto" else dispatch


def _rows_per_token(phase: dict[str, Any]) -> dict[str, float]:
    """Rows per token that started in this phase, summed over layers."""
    rows = {kind: int(np.sum(phase["rows"][kind])) for kind in ROW_KINDS}
    tokens = max(1, phase["tokens"])
    return {kind: count / tokens for kind, count in (rows | {"total": sum(rows.values())}).items()}


def _predict(prepared: PreparedModel, trace: RoutingTrace | None) -> dict[str, Any]:
    """The planner's count for the routing of the decode steps."""
    plan = prepared.plan
    if trace is None:
        nothing = np.zeros((plan.num_layers, plan.num_ranks, plan.num_ranks), dtype=int).tolist()
        return dict.fromkeys(ROW_KINDS, nothing)
    traffic = count_traffic(
        trace,
        plan,
        protocol=prepared.engine.protocol,
        coherence_domain=prepared.engine.coherence_domain,
        dispatch=_dispatch(prepared),
    )
    return {
        "dispatch": traffic.dispatch.tolist(),
        "combine": traffic.combine.tolist(),
        "rows_per_token": traffic.rows_per_token(),
        "imbalance": traffic.imbalance(),
        "load": traffic.load.tolist(),
    }
