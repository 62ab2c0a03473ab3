"""`exflow merge`: one trace of several, such as those of a job array over shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    traces: Annotated[list[Path], typer.Argument(help="Routing traces of one model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output if it is there.")
    ] = False,
) -> None:
    """Join routing traces of one model; sequences stay apart, kinds of text keep their names."""
    from placement.merging import merge_traces
    from placement.output import check_writable
    from placement.trace import RoutingTrace, TraceError

    if output.exists() and not overwrite:
        msg = f"{output} is there already; give --overwrite to replace it, or another -o"
        raise TraceError(msg)
    check_writable(output, inputs=traces)
    merged = merge_traces([RoutingTrace.load(path) for path in traces])
    merged.save(output)
    typer.echo(
        f"{output}: {merged.num_tokens} tokens of {len(set(merged.sequence_ids.tolist()))} "
        f"sequences from {len(traces)} traces"
    )
