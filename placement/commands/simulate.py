"""`exflow simulate`: what plans cost on a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def simulate(
    trace: Annotated[Path, typer.Argument(help="Routing trace to count on.")],
    plans: Annotated[list[Path], typer.Argument(help="Plans to compare.")],
    protocol: Annotated[
        Literal["home", "coherent"], typer.Option(help="home or coherent.")
    ] = "coherent",
    coherence_domain: Annotated[
        int | None, typer.Option(help="Ranks that share KV caches; all unless given.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(help="Elements of a row; needed for bytes.")
    ] = None,
    kv_elements: Annotated[
        int | None, typer.Option(help="K and V elements of a token and layer; needed for bytes.")
    ] = None,
    element_bytes: Annotated[int, typer.Option(help="Bytes of an element.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Count the rows, the load and the bytes of plans on a trace."""
    from placement.evaluation import format_table, measure
    from placement.interop.counts import require_routing
    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace

    routing = RoutingTrace.load(trace)
    require_routing(routing, "counting rows")
    rows = []
    for path in plans:
        plan = PlacementPlan.load(path)
        figures = measure(
            routing,
            plan,
            protocol=protocol,
            coherence_domain=coherence_domain,
            row_bytes=None if hidden_size is None else hidden_size * element_bytes,
            kv_bytes=None if kv_elements is None else kv_elements * element_bytes,
        )
        rows.append({"plan": str(path), **figures})
    if as_json:
        typer.echo(json.dumps({"trace": str(trace), "protocol": protocol, "plans": rows}))
    else:
        typer.echo(format_table(rows))
