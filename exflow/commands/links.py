"""`exflow links`: the latency and bandwidth of the links between ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def links(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON to write, for --links.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    timeout: Annotated[
        float, typer.Option(help="Seconds until a rank that died or hangs ends the run.")
    ] = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON instead.")
    ] = False,
) -> None:
    """Measure the links between the ranks of this job, inside nodes and between them.

    Start it with torchrun on the nodes that will serve. What it writes is for --links of place,
    simulate and run.
    """
    from exflow.links import format_table, measure_links, to_line
    from exflow.runtime.ranks import Ranks

    fits = measure_links(output, device=device, timeout=timeout)
    if Ranks.from_environment().is_first:
        typer.echo(to_line(fits) if as_json else format_table(fits))
