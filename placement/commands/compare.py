"""`exflow compare`: what changes from one plan to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def compare(
    old: Annotated[Path, typer.Argument(help="The plan in force.")],
    new: Annotated[Path, typer.Argument(help="The plan to come.")],
    trace: Annotated[Path | None, typer.Option(help="Trace to count rows and load on.")] = None,
    protocol: Annotated[
        Literal["home", "coherent"], typer.Option(help="home or coherent.")
    ] = "coherent",
    expert_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of one expert's weights; needed for bytes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what a change of plan moves, and rows and load before and after."""
    from placement.comparison import compare_plans
    from placement.evaluation import format_table, measure
    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace

    plans = {"old": PlacementPlan.load(old), "new": PlacementPlan.load(new)}
    changes = compare_plans(plans["old"], plans["new"], expert_bytes=expert_bytes)
    routing = None if trace is None else RoutingTrace.load(trace)
    rows = [
        {"plan": name, **measure(routing, plan, protocol=protocol)}
        for name, plan in plans.items()
        if routing is not None
    ]
    if as_json:
        typer.echo(json.dumps({**changes, "plans": rows}))
        return
    typer.echo(
        f"{changes['loaded']} of {changes['copies']} copies are loaded, {changes['dropped']} "
        f"dropped, in {changes['layers_changed']} layers"
    )
    if changes["bytes"] is not None:
        typer.echo(
            f"{changes['bytes']} bytes to migrate, {changes['bytes_busiest_rank']} to the busiest rank"
        )
    if rows:
        typer.echo(format_table(rows))
