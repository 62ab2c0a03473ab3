"""Measures the affinity of routing traces and writes docs/benchmarks/affinity.{json,md} and figures.

    python scripts/bench_affinity.py TRACE... [--against TRACE OTHER]...

runs `exflow affinity TRACE --json` (and again with --top1, and with --against for pairs of a model's
traces of two corpora), keeps the figures in the JSON file, rewrites the tables of the page, and
draws the figures. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
PAGE, DATA, FIGURES = DOCS / "affinity.md", DOCS / "affinity.json", DOCS / "figures"


def main() -> None:
    """Measure, write, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument(
        "--against",
        nargs=2,
        type=Path,
        action="append",
        default=[],
        metavar=("TRACE", "OTHER"),
        help="a trace, and one of the same model on other text",
    )
    arguments = parser.parse_args()
    pairs = [(trace, None) for trace in arguments.traces] + [tuple(p) for p in arguments.against]
    found = read_data() | {trace.stem: measure(trace, other) for trace, other in pairs}
    DOCS.mkdir(parents=True, exist_ok=True)
    DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_tables(found)
    draw(found)
    print(json.dumps({name: summarise(entry) for name, entry in found.items()}))


def read_data() -> dict[str, Any]:
    """What earlier runs measured on other traces."""
    return json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}


def measure(trace: Path, other: Path | None) -> dict[str, Any]:
    """`exflow affinity` with all choices and with the first choices only."""
    extra = [] if other is None else ["--against", str(other)]
    return {
        "topk": run_affinity(trace, *extra),
        "top1": run_affinity(trace, "--top1", *extra),
        "against": None if other is None else other.stem,
    }


def run_affinity(trace: Path, *options: str) -> dict[str, Any]:
    """One run of the command, with the processor time it took."""
    command = [sys.executable, "-m", "exflow", "affinity", str(trace), "--json", *options]
    before = os.times()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    after = os.times()
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    return figures | {"processor_seconds": round(seconds, 1)}


def summarise(entry: dict[str, Any]) -> dict[str, Any]:
    """The headline figures of a trace."""
    figures, paths = entry["topk"], entry["top1"]
    information = paths["mutual_information"]["top1"]
    domains = figures["stability"]["domains"]
    return {
        "tokens": figures["tokens"],
        "mutual_information": information["mean"],
        "null": information["null"],
        "null_within_sequence": information["null_within_sequence"],
        "load_skew": figures["load_skew"]["mean"],
        "halves": figures["stability"]["halves"]["correlation"],
        "domain_transfer": domains["transfer"] if domains else None,
        "processor_seconds": figures["processor_seconds"],
    }


def write_tables(found: dict[str, Any]) -> None:
    """Replaces what stands between the markers of each table in the page."""
    if not PAGE.exists():
        return
    text = PAGE.read_text(encoding="utf-8")
    tables = {"strength": strength(found), "convergence": convergence(found)}
    for name in found:
        for kind in ("topk", "top1"):
            tables[f"{name} {kind}"] = agreement(found[name][kind]["stability"]["domains"])
            tables[f"{name} {kind} against"] = agreement(found[name][kind]["stability"]["against"])
    for name, table in tables.items():
        marked = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(marked, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


def strength(found: dict[str, Any]) -> str:
    """A column for each trace."""
    rows: list[list[Any]] = [["", *found]]
    shape = ("tokens", "sequences", "experts", "top_k")
    rows += [[name.replace("_", "-"), *(e["topk"][name] for e in found.values())] for name in shape]
    rows.append(["MoE layers", *(len(entry["topk"]["layer_ids"]) for entry in found.values())])

    def add(label: str, pick: Any, *keys: str) -> None:
        rows.append([label, *(_numbers(pick(e), keys) for e in found.values())])

    nulls = ("mean", "null", "null_within_sequence")
    add(
        "load of experts, max / mean: mean, worst layer",
        lambda e: e["topk"]["load_skew"],
        "mean",
        "max",
    )
    for name, label in (("top1", "first choices"), ("topk", "all choices")):
        add(
            f"normalised mutual information, {label}: measured, shuffled, shuffled in sequence",
            lambda e, n=name: e["topk"]["mutual_information"][n],
            *nulls,
        )
    for kind, label in (("top1", "first choices"), ("topk", "all choices")):
        for name in ("top_successor", "effective_successors", "normalised_entropy"):
            add(
                f"{name.replace('_', ' ')}, {label}: measured, shuffled",
                lambda e, k=kind, n=name: e[k]["concentration"][n],
                "mean",
                "null",
            )
    add(
        "co-activation beyond load: measured, shuffled",
        lambda e: e["topk"]["coactivation"],
        "mean",
        "null",
    )
    for kind, label in (("top1", "first choices"), ("topk", "all choices")):
        add(
            f"half to half, {label}: correlation, kept on one of 4 ranks",
            lambda e, k=kind: e[k]["stability"]["halves"],
            "correlation",
            "kept",
        )
    rows.append(
        [
            "processor seconds of `exflow affinity`",
            *(e["topk"]["processor_seconds"] for e in found.values()),
        ]
    )
    return _markdown(rows)


def convergence(found: dict[str, Any]) -> str:
    """A row for each trace, of first choices and of all; a column for each number of tokens."""
    curves = {
        f"{name}, {label}": entry[kind]["stability"]["convergence"]
        for name, entry in found.items()
        for kind, label in kinds(entry)
    }
    sizes = sorted({row["tokens"] for rows in curves.values() for row in rows[:-1]})
    table: list[list[Any]] = [["trace", *sizes, "the whole half"]]
    for label, rows in curves.items():
        cells = {row["tokens"]: f"{row['correlation']:.2f} ({row['kept']:.2f})" for row in rows}
        last = rows[-1]["tokens"]
        table.append(
            [label, *(cells.get(n, "") for n in sizes), f"{cells[last]} of {last:,} tokens"]
        )
    return _markdown(table)


def kinds(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """First choices and, unless the model is top-1, all choices."""
    both = [("top1", "first choices"), ("topk", "all choices")]
    return both if entry["topk"]["top_k"] > 1 else [("top1", "top-1")]


def agreement(table: dict[str, Any] | None) -> str:
    """Correlation and kept share: fitted on the row's text, measured on the column's."""
    if table is None:
        return ""
    numbers = [str(i + 1) for i in range(len(table["names"]))]
    rows: list[list[Any]] = [["fitted on", "tokens", *numbers]]
    for number, name, tokens, correlation, kept in zip(
        numbers,
        table["names"],
        table["tokens"],
        table["correlation"],
        table["kept"],
        strict=True,
    ):
        cells = [f"{c:.2f} ({k:.2f})" for c, k in zip(correlation, kept, strict=True)]
        rows.append([f"{number} {name}", tokens, *cells])
    note = f"\n\nA placement fitted on another text keeps {table['transfer']:.2f} of what one fitted on the text's own kind keeps."
    return _markdown(rows) + note


def _markdown(rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _numbers(entry: dict[str, float] | None, keys: tuple[str, ...]) -> str:
    return "" if entry is None else " / ".join(_number(entry[key]) for key in keys)


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def draw(found: dict[str, Any]) -> None:
    """Convergence, and mutual information by layer, as SVG files."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "exflow",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    FIGURES.mkdir(parents=True, exist_ok=True)
    _draw_convergence(found)
    _draw_information(found)


STYLES = (
    ("#1f6fb8", "-", "o"),
    ("#d9772b", "--", "s"),
    ("#14806a", ":", "^"),
    ("#8e5bb0", "-.", "D"),
)


def _draw_convergence(found: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    titles = ("correlation with held-out text", "kept on one of 4 ranks, held-out text")
    for panel, title, measure_name in zip(panels, titles, ("correlation", "kept"), strict=True):
        for (name, entry), (colour, line, marker) in zip(found.items(), STYLES, strict=False):
            for kind, label in kinds(entry):
                rows = entry[kind]["stability"]["convergence"]
                panel.plot(
                    [row["tokens"] for row in rows],
                    [row[measure_name] for row in rows],
                    line,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    alpha=1.0 if kind == "top1" else 0.5,
                    label=f"{name}, {label}",
                )
        if measure_name == "kept":
            panel.axhline(0.25, color="grey", linewidth=0.8)
            panel.text(140, 0.26, "by chance", color="grey", fontsize=8)
        panel.set(xscale="log", ylim=(0, 1), title=title, xlabel="tokens fitted")
        panel.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(FIGURES / "affinity-convergence.svg", metadata={"Date": None})
    plt.close(figure)


def _draw_information(found: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9.5, 3.4), layout="constrained")
    for (name, entry), (colour, line, marker) in zip(found.items(), STYLES, strict=False):
        information = entry["top1"]["mutual_information"]["top1"]
        layers = entry["top1"]["layer_ids"][1:]
        panel.plot(layers, information["per_layer"], line, color=colour, marker=marker, label=name)
        panel.axhline(information["null_within_sequence"], color=colour, linestyle=line, alpha=0.4)
    panel.set(
        ylim=(0, None),
        xlabel="MoE layer",
        ylabel="mutual information with\nthe layer before (normalised)",
        title="first choices; the flat lines are the same with tokens shuffled in their sequences",
    )
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(FIGURES / "affinity-by-layer.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
