"""The command line `exflow`: the planner's commands and the runtime's in one app."""

from __future__ import annotations

from typing import Annotated

import typer

import placement.cli
from exflow import __version__

COMMANDS = {
    "sample-corpus": "exflow.commands.sample_corpus",
    "profile": "exflow.commands.profile",
    "record": "exflow.commands.record",
    "convert-deepspeed": "exflow.commands.convert_deepspeed",
    **placement.cli.COMMANDS,
    "links": "exflow.commands.links",
    "run": "exflow.commands.run",
    "bench": "exflow.commands.bench",
    "report": "exflow.commands.report",
}


def main() -> None:
    """Runs `exflow`."""
    app = placement.cli.make_app(
        "Place the experts of a Mixture-of-Experts model by affinity, and decode with the plan."
    )
    app.callback()(_set_up)
    placement.cli.mount(app, COMMANDS)
    placement.cli.run(app, "exflow")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"exflow {__version__}")
        raise typer.Exit


def _set_up(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log details to stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")
    ] = False,
    _local_rank: Annotated[
        int,
        typer.Option(
            "--local_rank", hidden=True, help="DeepSpeed adds it; LOCAL_RANK says it too."
        ),
    ] = 0,
) -> None:
    placement.cli.configure_logging(verbose=verbose)
