"""The report on traffic: rows by arm and layer, from rank to rank, and the load of ranks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from exflow.report.html import figure, side_by_side, table
from exflow.report.svg import Bar, Line, bars, grid, lines, load_strip

if TYPE_CHECKING:
    from exflow.report.figures import Arm, ModelFigures

MOST_MATRICES = 4


def rows_section(model: ModelFigures) -> str:
    """Rows per token of every arm, in all and by layer."""
    series = ("dispatch", "combine")
    entries = []
    for arm in model.arms:
        rows = arm.traffic.rows_per_token()
        change = rows["total"] / model.baseline.rows - 1 if model.baseline.rows else 0.0
        remark = (
            "the baseline"
            if arm is model.baseline
            else f"{change:+.0%}".replace("-", "\N{MINUS SIGN}")
        )
        imbalance = arm.traffic.imbalance()["mean"]
        entries.append(
            Bar(
                label=arm.label,
                parts=[rows[name] for name in series],
                remark=f"{remark} · load {imbalance:.2f}",
                is_strong=arm is model.best,
            )
        )
    layer_ids = model.trace.layer_ids
    by_layer = [
        Line(
            name=arm.label,
            xs=layer_ids,
            ys=(_rows_by_layer(arm) / arm.traffic.num_tokens).tolist(),
        )
        for arm in _shown(model)
    ]
    return (
        "<h3>Rows on the wire</h3>"
        f"<p>A row is one hidden vector sent from one rank to another. {_counted_on(model)}</p>"
        + figure(
            bars("Rows per token by arm", entries, series),
            "Rows per token, summed over layers, for each protocol/plan. “load” is the busiest "
            "rank over the mean, averaged over layers: 1 is even.",
        )
        + side_by_side(
            [
                figure(
                    lines(
                        "Rows per token by layer",
                        by_layer,
                        x_label="MoE layer",
                        y_label="rows per token",
                    ),
                    "Dispatch and combine of each layer.",
                ),
                _arms_table(model),
            ]
        )
    )


def _counted_on(model: ModelFigures) -> str:
    tokens = f"{model.counted_on.num_tokens:,} tokens"
    if model.is_held_out:
        return f"Counted on {tokens} that the plans have not seen."
    return (
        f"Counted on the {tokens} of the profile, which the plans were fitted to; "
        "give <code>--held-out</code> for text they have not seen."
    )


def _arms_table(model: ModelFigures) -> str:
    names = ["dispatch", "combine", "total"]
    if model.plans["linear"].topology.num_nodes > 1:
        names += ["inter_node", "inter_node_dedup"]
    rows = []
    for arm in model.arms:
        per_token, imbalance = arm.traffic.rows_per_token(), arm.traffic.imbalance()
        figures = [f"{per_token[name]:.2f}" for name in names]
        rows.append([arm.label, *figures, f"{imbalance['mean']:.2f}", f"{imbalance['max']:.2f}"])
    return table(
        ["protocol/plan", *(name.replace("_", " ") for name in names), "load", "worst layer"],
        rows,
        caption="Rows per token, summed over layers; load: max / mean over ranks",
    )


def matrices_section(model: ModelFigures) -> str:
    """Rank-to-rank traffic."""
    shown = _shown(model)
    matrices = [_rows_by_pair(arm) / arm.traffic.num_tokens for arm in shown]
    most = max(float(matrix.max()) for matrix in matrices)
    ranks = [str(rank) for rank in range(matrices[0].shape[0])]
    digits = 1 if most >= 10 else 2
    pictures = [
        figure(
            grid(
                f"Rows from rank to rank, {arm.label}",
                matrix.tolist(),
                rows=ranks,
                columns=ranks,
                most=most,
                digits=digits,
            ),
            f"{matrix.sum():.1f} rows per token in all",
            heading=arm.label,
        )
        for arm, matrix in zip(shown, matrices, strict=True)
    ]
    return (
        "<h3>Who sends to whom</h3><p>Rows per token from one rank (down) to another "
        f"(across), dispatch and combine, all layers. One scale for all.</p>{side_by_side(pictures)}"
    )


def load_section(model: ModelFigures) -> str:
    """Load per rank and layer, one strip a plan."""
    pictures = []
    for name in model.plans:
        arm = next(a for a in model.arms if a.plan_name == name and a.protocol == "coherent")
        load = arm.traffic.load
        shares = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-12)
        pictures.append(
            figure(
                load_strip(f"Load per rank, {name}", shares.tolist(), model.trace.layer_ids),
                f"Max / mean {shares.max(axis=1).mean():.2f} on average, "
                f"{shares.max():.2f} in the worst layer.",
                heading=escape(name),
            )
        )
    return (
        "<h3>Load per rank</h3><p>Routed (token, expert) pairs of each rank over the mean of the layer: "
        "blue is below, orange above, at full strength 40% from even. Layers run across."
        f"</p>{side_by_side(pictures)}"
    )


def _shown(model: ModelFigures) -> list[Arm]:
    """The arms worth a picture each: the paper's three steps, then other plans under coherent."""
    return [arm for arm in model.arms if arm.protocol == "coherent" or arm is model.baseline][
        :MOST_MATRICES
    ]


def _rows_by_layer(arm: Arm) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    rows = arm.traffic.dispatch + arm.traffic.combine
    return np.asarray(rows.sum(axis=(1, 2)), dtype=np.int64)


def _rows_by_pair(arm: Arm) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    rows = arm.traffic.dispatch + arm.traffic.combine
    return np.asarray(rows.sum(axis=0), dtype=np.int64)
