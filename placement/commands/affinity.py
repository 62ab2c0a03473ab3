"""`exflow affinity`: how strong, how even and how stable the affinity of a routing trace is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence


def affinity(
    traces: Annotated[list[Path], typer.Argument(help="Routing traces; several are merged.")],
    against: Annotated[
        Path | None, typer.Option(help="A trace of other text, to see how far affinity carries.")
    ] = None,
    top1: Annotated[
        bool, typer.Option("--top1", help="Only the first choice of each token: the paper's path.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of the quick placements.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Measure the affinity of a routing trace: its strength, its load, its stability."""
    from placement.merging import merge_traces
    from placement.stability import describe_stability
    from placement.statistics import describe
    from placement.trace import RoutingTrace
    from placement.traffic import require_routing

    trace = merge_traces([RoutingTrace.load(path) for path in traces])
    other = None if against is None else RoutingTrace.load(against)
    for loaded in (trace, other):
        if loaded is not None:
            require_routing(loaded, "affinity")
    if top1:
        trace = trace.top1()
        other = None if other is None else other.top1()
    figures = {
        "trace": ", ".join(path.stem for path in traces),
        **describe(trace),
        "stability": describe_stability(trace, other, num_ranks=ranks),
    }
    typer.echo(json.dumps(figures) if as_json else "\n".join(_lines(figures)))


def _lines(figures: dict[str, Any]) -> list[str]:
    """The figures as text."""
    stability = figures["stability"]
    lines = [
        f"{figures['trace']}: {figures['model']}, {figures['phase']}",
        f"{figures['tokens']} tokens of {figures['sequences']} sequences, "
        f"{len(figures['layer_ids'])} MoE layers, top-{figures['top_k']} of {figures['experts']}",
        "",
        *_strength(figures),
        *_foretold(figures["foretold"]),
        "",
        f"stability (affinity beyond load; transitions kept on one of {stability['ranks']} ranks, "
        f"{1 / stability['ranks']:.2f} by chance)",
        *_table(
            ["", "correlation", "kept"],
            [["half to half", stability["halves"]["correlation"], stability["halves"]["kept"]]],
        ),
        "",
        *_table(
            ["tokens fitted", "correlation", "kept"],
            [[row["tokens"], row["correlation"], row["kept"]] for row in stability["convergence"]],
        ),
    ]
    for title, table in (("domains", stability["domains"]), ("traces", stability["against"])):
        if table is not None:
            lines += ["", *_agreement(title, table)]
    return lines


def _strength(figures: dict[str, Any]) -> list[str]:
    rows = [["load, max / mean", figures["load_skew"]]]
    rows += [[_words(name), entry] for name, entry in figures["concentration"].items()]
    information = figures["mutual_information"]
    rows.append(["mutual information, first choices", information["top1"]])
    if figures["top_k"] > 1:
        rows.append(["mutual information, all choices", information["topk"]])
        rows.append(["co-activation beyond load", figures["coactivation"]])
    names = ("mean", "min", "max", "null", "null_within_sequence")
    return _table(
        ["per layer", "mean", "min", "max", "null", "null within sequence"],
        [[label, *(entry.get(name, "") for name in names)] for label, entry in rows],
    )


def _foretold(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return []
    return [
        "",
        f"the token alone foretells {found['share']:.3f} of the first layer's choices "
        f"({found['null']:.3f} by chance)",
    ]


def _agreement(title: str, table: dict[str, Any]) -> list[str]:
    """Rows: fitted on; columns: measured on."""
    numbers = [str(i + 1) for i in range(len(table["names"]))]
    names = [f"{i} {name}" for i, name in zip(numbers, table["names"], strict=True)]
    lines = [f"{title}: a placement made for another keeps {table['transfer']:.3f} of one's own"]
    for measure in ("correlation", "kept"):
        rows = [
            [name, tokens, *row]
            for name, tokens, row in zip(names, table["tokens"], table[measure], strict=True)
        ]
        lines += ["", *_table([f"{measure}: fitted on", "tokens", *numbers], rows)]
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns: the first to the left, numbers to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
