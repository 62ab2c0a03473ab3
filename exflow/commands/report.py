"""`exflow report`: one HTML file about profiles, plans and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    trace: Annotated[list[Path], typer.Option(help="The profile; one for each model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")],
    plan: Annotated[
        list[Path] | None, typer.Option(help="A plan to show; may be given again.")
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="A trace of text the plans have not seen, to count rows on."),
    ] = None,
    metrics: Annotated[
        list[Path] | None, typer.Option(help="What `exflow run --metrics` wrote; may be repeated.")
    ] = None,
) -> None:
    """Write a report: affinity before and after placement, rows, load, stability, measurements.

    Plans, held-out traces and metrics are shown with the profile of their model. The file is
    complete in itself.
    """
    from exflow.report.figures import gather
    from exflow.report.page import render
    from placement.output import check_writable, replacing

    inputs = (trace, plan, held_out, metrics)
    check_writable(output, inputs=[path for paths in inputs for path in paths or []])
    models = gather(trace, plan or [], held_out=held_out or [], metrics=metrics or [])
    with replacing(output) as partial:
        partial.write_text(render(models), encoding="utf-8")
    typer.echo(f"{output}: {', '.join(model.name for model in models)}")
