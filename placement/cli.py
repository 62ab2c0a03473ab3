"""The planner's command line: `python -m placement`; `exflow` mounts the same commands.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMANDS = {
    "affinity": "placement.commands.affinity",
    "place": "placement.commands.place",
    "merge": "placement.commands.merge",
    "simulate": "placement.commands.simulate",
    "compare": "placement.commands.compare",
    "import": "placement.commands.import_trace",
    "export": "placement.commands.export",
    "lint": "placement.commands.lint",
    "verify": "placement.commands.verify",
}

OWN_PACKAGES = ("exflow", "placement")
USER_ERROR_EXIT = 2


def main() -> None:
    """Runs `python -m placement`."""
    app = make_app("Place the experts of a Mixture-of-Experts model from its routing trace.")
    mount(app, COMMANDS)
    run(app, "python -m placement")


def make_app(description: str) -> typer.Typer:
    """An app with plain help (rich costs a tenth of a second to import) and plain tracebacks."""
    app = typer.Typer(
        help=description,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_set_up)
    return app


def mount(app: typer.Typer, commands: Mapping[str, str]) -> None:
    """Adds commands to an app.

    Args:
        app: The app.
        commands: Module of each command by name; the function in it has the module's last name.
    """
    for name, module_name in commands.items():
        function = getattr(import_module(module_name), module_name.rpartition(".")[2])
        app.command(name)(function)


def run(app: typer.Typer, program: str) -> None:
    """Runs an app; a user's mistake ends it with one line on stderr and exit code 2.

    So does a package that is not there: the planner's commands do without torch, others do not.
    """
    try:
        app(prog_name=program)
    except UserError as error:
        _exit_with(str(error))
    except ModuleNotFoundError as error:
        name = error.name or ""
        if not name.isidentifier() or name in OWN_PACKAGES:
            raise
        _exit_with(f"this needs the package {name}, which is not installed; `pip install {name}`")
    except OSError as error:
        if error.filename is None:
            raise
        _exit_with(f"{error.filename}: {error.strerror}")


def configure_logging(*, verbose: bool) -> None:
    """Sends our log lines to stderr: from INFO up, or DEBUG if verbose; others' warnings too."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    for package in OWN_PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)


def _set_up(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log details to stderr.")] = False,
) -> None:
    configure_logging(verbose=verbose)


def _exit_with(message: str) -> None:
    line = " ".join(part.strip() for part in message.splitlines())  # others' reasons have several
    sys.stderr.write(f"error: {line}\n")
    raise SystemExit(USER_ERROR_EXIT)
