"""The report on runs: what was measured while decoding, against what was predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exflow.report.html import figure, table
from exflow.report.svg import Bar, bars

if TYPE_CHECKING:
    from exflow.report.figures import ModelFigures, Run

GROUPS = {
    "attention and gate": ("start", "attention", "gate", "sampling"),
    "experts": ("experts",),
    "dispatch and combine": ("dispatch", "combine"),
    "sharing tokens, K and V": ("share",),
}


def runs_section(model: ModelFigures) -> str:
    """Rows and time of each run; nothing without runs."""
    if not model.runs:
        return ""
    rows = [
        [
            run.label,
            run.num_ranks,
            f"{run.rows_per_token['total']:.2f}",
            f"{run.predicted_rows_per_token.get('total', 0.0):.2f}",
            run.is_as_predicted,
            "" if run.imbalance is None else f"{run.imbalance:.2f}",
            f"{run.tokens_per_second:.0f}",
        ]
        for run in model.runs
    ]
    header = ["run", "ranks", "rows per token", "predicted", "equal, pair by pair"]
    return (
        "<h3>Measured while decoding</h3>"
        "<p>Rows counted on the wire, against what the traffic model counts for the same routing, "
        "layer by layer and rank by rank.</p>"
        + table([*header, "imbalance", "tokens per second"], rows)
        + figure(
            bars(
                "Seconds by section of the decode steps",
                [Bar(label=run.label, parts=_grouped(run)) for run in model.runs],
                list(GROUPS),
                unit=" s",
            ),
            "Time in each section of the decode steps, mean over ranks. On one machine ranks share "
            "its cores and sending is copying: read rows, not seconds, for what a cluster gains.",
        )
    )


def _grouped(run: Run) -> list[float]:
    return [sum(run.seconds.get(name, 0.0) for name in names) for names in GROUPS.values()]
