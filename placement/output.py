"""Files that are written: refused before the work where they cannot be, whole or not there after."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class OutputError(UserError):
    """A file that cannot be written, or that holds something else."""


def check_writable(path: Path, *, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse a path that `replacing` cannot write, or should not, before hours of work.

    Args:
        path: what will be written.
        inputs: what is read, and must not be written over.

    Raises:
        OutputError: it cannot, or is one of the inputs.
    """
    if path.resolve() in {read.resolve() for read in inputs if read is not None}:
        msg = f"{path}: it is read here, and would be overwritten; name another output"
        raise OutputError(msg)
    with naming(path):
        partial = _partial_of(path)
        existed = partial.exists()
        with partial.open("ab"):
            pass
        if not existed:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its name when the block ends, or else is removed.

    A link stays one: what it leads to is replaced, and keeps its permissions.

    Raises:
        OutputError: it cannot be written.
    """
    with naming(path):
        partial = _partial_of(path)
        partial.open("wb").close()
    try:
        yield partial
        with naming(path):
            target = path.resolve()
            if target.exists():
                partial.chmod(target.stat().st_mode)
            partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _partial_of(path: Path) -> Path:
    target = path.resolve()
    if path.is_relative_to("/dev") or (target.exists() and not target.is_file()):
        what = "a folder" if target.is_dir() else "no regular file"
        msg = f"{path}: cannot be written, it is {what}; name a file"
        raise OutputError(msg)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(target.name + ".partial")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block is an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror or error}; name another file"
        raise OutputError(msg) from error
