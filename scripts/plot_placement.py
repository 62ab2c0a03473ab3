"""Markdown tables and figures of docs/benchmarks/placement.md from results of bench_placement.py.

python scripts/plot_placement.py RESULTS.json... -o docs/benchmarks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NAMES = {
    "gptoss20b_decode": "gpt-oss-20b (24 layers, 32 experts, top-4)",
    "dsv2lite_esft": "DeepSeek-V2-Lite (26 layers, 64 experts, top-6)",
}


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args()
    merged: dict[str, list[dict[str, Any]]] = {}
    for path in args.results:
        for part, rows in json.loads(path.read_text()).items():
            if isinstance(rows, list):
                merged.setdefault(part, []).extend(rows)
    for part, show in TABLES.items():
        if merged.get(part):
            print(f"\n<!-- {part} -->\n" + "\n".join(show(merged[part])))
    if merged.get("frontier"):
        plot_frontier(merged["frontier"], args.output / "figures/placement-frontier.svg")
    if merged.get("growth"):
        plot_growth(merged["growth"], args.output / "figures/placement-growth.svg")


def cell_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a strategy and machine."""
    lines = [
        "| trace | machine | slots | strategy | cap asked | rows/token | vs linear, home (95%) | inter-node | imbalance mean, max | crossing | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(
                f"| {r['trace'].split('_')[0]} | {r['num_nodes']}x{r['ranks_per_node']} | {r['slots_per_rank']} | {r['strategy']} | {r['cap']} | {r['error']} | | | | | |"
            )
            continue
        change, low, high = (100 * x for x in r["change"])
        base = r["linear_home_inter_node_rows"]
        inter = (
            f"{r['inter_node_rows']:.2f} ({100 * (r['inter_node_rows'] / base - 1):+.0f}%)"
            if base
            else "-"
        )
        lines.append(
            f"| {r['trace'].split('_')[0]} | {r['num_nodes']}x{r['ranks_per_node']} | {r['slots_per_rank']} "
            f"| {r['strategy']} | {r['cap']} | {r['rows']:.1f} | {change:+.1f}% ({low:+.1f} to {high:+.1f}) | {inter} "
            f"| {r['imbalance_mean']:.3f}, {r['imbalance_max']:.2f} | {r['crossing_rate']:.3f} | {r['seconds']:.0f} |"
        )
    return lines


def plain_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a row, one column a key."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]


def shift_table(rows: list[dict[str, Any]]) -> list[str]:
    """Gain by fitted and measured domain, and the share of the domain's own gain."""
    lines = []
    for row in rows:
        lines += ["", f"{row['trace']}: fitted on (line), measured on (column)", ""]
        lines += [
            "| | " + " | ".join(row["domains"]) + " |",
            "|---|" + "---|" * len(row["domains"]),
        ]
        for fitted, gains in row["gain"].items():
            shown = [
                f"{100 * gains[d]:.1f}% ({100 * row['kept'][fitted][d]:.0f})"
                for d in row["domains"]
            ]
            lines.append(f"| {fitted} | " + " | ".join(shown) + " |")
    return lines


TABLES = {
    "cells": cell_table,
    "crossing": plain_table,
    "folds": plain_table,
    "null": plain_table,
    "shift": shift_table,
    "homing": plain_table,
}


def plot_frontier(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out rows against held-out imbalance, one line a trace and number of slots."""
    plt = import_pyplot()
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    figure, axes = plt.subplots(1, len(traces), figsize=(4.5 * len(traces), 3.4), squeeze=False)
    for axis, trace in zip(axes[0], traces, strict=True):
        for slots in sorted({row["slots_per_rank"] for row in rows if row["trace"] == trace}):
            line = [r for r in rows if (r["trace"], r["slots_per_rank"]) == (trace, slots)]
            points = [(r["imbalance_mean"], r["rows"]) for r in line]
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{slots} slots a rank")
        axis.set(title=NAMES.get(trace, trace), xlabel="imbalance (mean over layers)")
        axis.set_ylabel("rows per token, coherent, 4 ranks")
        axis.title.set_fontsize(9)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def plot_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds from a trace to a plan against each size."""
    plt = import_pyplot()
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = plt.subplots(1, len(sizes), figsize=(2.8 * len(sizes), 2.8), sharey=True)
    for axis, size in zip(axes, sizes, strict=True):
        points = [(row[size], row["seconds"]) for row in rows if row["size"] == size]
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.set(xlabel=size, xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds from trace to plan")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def import_pyplot() -> Any:
    """Matplotlib that writes the same file for the same figures."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "exflow"
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    main()
