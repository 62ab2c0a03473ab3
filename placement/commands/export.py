"""`exflow export`: a plan in the form an engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan

HELP = "sglang, trtllm, vllm, vllm-41141, vllm-34811, vllm-ascend, deepspeed, exflow-csv or checkpoint."


def export(
    plan: Annotated[Path, typer.Argument(help="The placement plan.")],
    target: Annotated[str, typer.Option(help=HELP)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write; a folder for checkpoint.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, or the folder it is in.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="With checkpoint: the checkpoint to permute.")
    ] = None,
    fill: Annotated[
        bool, typer.Option("--fill", help="Fill unused slots with more replicas first.")
    ] = False,
) -> None:
    """Write a plan for an engine, or say why that engine cannot take it."""
    from placement.interop.model_shape import ModelShape
    from placement.interop.targets import export_text, find_target
    from placement.output import check_writable, replacing
    from placement.plan import PlacementPlan

    placed = PlacementPlan.load(plan)
    if target == "checkpoint":
        _export_checkpoint(placed, source, output)
        return
    check_writable(output, inputs=[plan, config])
    if fill:
        filled = output.with_name(output.stem + ".plan.json")
        check_writable(filled, inputs=[plan, config])
        placed = _filled(placed, filled)
    found = find_target(target)
    shape = ModelShape.from_config(config) if config else ModelShape.of_plan(placed)
    text = export_text(placed, found, shape)
    with replacing(output) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(f"{output}: {placed.num_slots} slots on {placed.num_ranks} ranks for {target}")
    for finding in found.check(placed, shape):
        typer.echo(f"note: {finding.text}")
    for line in found.usage(placed, shape, output):
        typer.echo(f"use: {line}")


def _filled(plan: PlacementPlan, path: Path) -> PlacementPlan:
    """The plan with all slots in use, saved beside the output: that is what the engine will run."""
    from placement.interop.slots import fill_slots

    filled = fill_slots(plan)
    filled.save(path)
    typer.echo(f"{path}: {filled.num_slots - plan.num_slots} unused slots filled; verify with it")
    return filled


def _export_checkpoint(plan: PlacementPlan, source: Path | None, output: Path) -> None:
    from placement.interop import checkpoint
    from placement.interop.errors import ExportError

    if source is None:
        msg = "--target checkpoint needs --source, the folder of the checkpoint to permute"
        raise ExportError(msg)
    checkpoint.export(plan, _shape_of(source), source, output, on_file=_progress)
    typer.echo(f"{output}: experts and routers of {plan.num_layers} layers permuted")
    typer.echo(
        f"use: any engine with contiguous experts on {plan.num_ranks} expert-parallel ranks, "
        f"no placement options"
    )


def _shape_of(source: Path) -> ModelShape:
    from placement.interop.model_shape import ModelShape

    return ModelShape.from_config(source)


def _progress(name: str) -> None:
    typer.echo(f"  {name}", err=True)
