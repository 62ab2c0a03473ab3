"""`exflow verify`: does a plan do in use what was predicted?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from placement.interop.verification import Comparison


def verify(
    plan: Annotated[Path, typer.Argument(help="The plan that was in use.")],
    trace: Annotated[Path, typer.Argument(help="A trace recorded while it was in use.")],
    expected: Annotated[
        Path | None, typer.Option(help="The trace the plan was made from; else its own figures.")
    ] = None,
    served: Annotated[
        Path | None, typer.Option(help="The placement that the engine reports (see --target).")
    ] = None,
    target: Annotated[str, typer.Option(help="Form of --served, as for export.")] = "sglang",
    config: Annotated[Path | None, typer.Option(help="The model's config.json.")] = None,
    protocol: Annotated[str, typer.Option(help="home (engines) or coherent (ExFlow).")] = "home",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Difference that is accepted, as a share.")
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a plan's predicted rows and load with those of a recorded trace; exit code 1 if off."""
    from placement.interop.verification import compare, served_differences
    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace

    placed = PlacementPlan.load(plan)
    fit = None if expected is None else RoutingTrace.load(expected)
    result = compare(placed, RoutingTrace.load(trace), fit, protocol=protocol)
    differences = None
    if served is not None:
        differences = served_differences(placed, served, target, config)
    off = [item.name for item in result if item.is_off(tolerance)]
    if as_json:
        typer.echo(json.dumps(_as_dict(result, differences, off)))
    else:
        _print(result, differences, tolerance)
    if off or differences:
        raise typer.Exit(1)


def _print(result: list[Comparison], differences: int | None, tolerance: float) -> None:
    typer.echo(f"{'':28} {'predicted':>10} {'recorded':>10} {'ratio':>7}")
    for item in result:
        mark = "  off" if item.is_off(tolerance) else ""
        typer.echo(
            f"{item.name:28} {item.predicted:10.3f} {item.recorded:10.3f} {item.ratio:7.3f}{mark}"
        )
    if differences is not None:
        said = "the engine serves this plan" if not differences else "the engine serves another one"
        typer.echo(f"served placement: {differences} (layer, rank) pairs differ; {said}")


def _as_dict(result: list[Comparison], differences: int | None, off: list[str]) -> dict[str, Any]:
    figures = {item.name: [item.predicted, item.recorded] for item in result}
    return {"figures": figures, "off": off, "served_differences": differences}
