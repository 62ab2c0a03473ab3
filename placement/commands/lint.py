"""`exflow lint`: what an engine would not like about a plan, or about a file made for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from placement.interop.model_shape import ModelShape
    from placement.interop.targets import Finding
    from placement.plan import PlacementPlan


def lint(
    file: Annotated[Path, typer.Argument(help="A plan, or a file in the target's own form.")],
    target: Annotated[str, typer.Option(help="As for export.")],
    model: Annotated[
        Path | None, typer.Option(help="The model's config.json, or the folder it is in.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="For a file in the target's form: expert-parallel ranks.")
    ] = 1,
) -> None:
    """Check a plan for a target; exit code 1 if the target cannot take it."""
    from placement.interop.errors import ExportError
    from placement.interop.model_shape import ModelShape
    from placement.interop.targets import error, read_export
    from placement.topology import Topology

    shape = ModelShape.from_config(model) if model else None
    plan = _as_plan(file)
    findings: list[Finding] = []
    if plan is not None:
        findings = _check(plan, target, shape or ModelShape.of_plan(plan))
    else:
        try:
            read = read_export(target, file, shape or ModelShape(), ranks)
            read.to_plan(Topology(num_nodes=1, ranks_per_node=ranks), model="", source=target)
        except ExportError as refused:
            findings = [error(str(refused))]
    for finding in findings:
        typer.echo(f"{finding.level}: {finding.text}")
    errors = sum(finding.level == "error" for finding in findings)
    if model is None:
        typer.echo("note: without --model, layers and groups were not compared with the model's")
    typer.echo(f"{file} for {target}: {errors} errors, {len(findings) - errors} warnings")
    if errors:
        raise typer.Exit(1)


def _as_plan(file: Path) -> PlacementPlan | None:
    """The plan in a file; None if the file is in another form."""
    from placement.plan import FORMAT, PlacementPlan

    if file.is_dir() or (file.is_file() and FORMAT.encode() not in file.read_bytes()):
        return None
    return PlacementPlan.load(file)


def _check(plan: PlacementPlan, target: str, shape: ModelShape) -> list[Finding]:
    from placement.interop import checkpoint
    from placement.interop.targets import find_target

    if target == "checkpoint":
        return checkpoint.check(plan, shape)
    return find_target(target).check(plan, shape)
