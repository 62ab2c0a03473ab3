"""The file of completions: a JSON line a finished request, written as it finishes."""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING, Any, BinaryIO

from placement.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from exflow.runtime.requests import Completion


class OutputError(UserError):
    """A file that cannot be written, or that holds something else."""


class CompletionFile:
    """Appends completions to a file, which may have some from an earlier run.

    Attributes:
        finished: ids of the requests the file has.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there and open the file to append.

        A last line without its end was being written when the earlier run was killed: it is cut.
        The file is locked, so that no two runs append the same requests.

        Raises:
            OutputError: it cannot be written, or has lines that are no completions.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
            _lock(self._file, path)
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._file.truncate(len(whole))
            self.finished = _ids(whole, path)
        except OSError as error:
            msg = f"{path}: cannot be written: {error.strerror or error}"
            raise OutputError(msg) from error

    def __enter__(self) -> CompletionFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, completion: Completion) -> None:
        """Write one completion, so that it is on disk whatever happens to this process next."""
        request = completion.request
        line: dict[str, Any] = {
            "id": request.id,
            "prompt": request.prompt,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(request.token_ids),
        }
        if completion.reason:
            line["reason"] = completion.reason
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        msg = f"{path}: another run is writing it; wait for it, or end it if it hangs"
        raise OutputError(msg) from error


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before hours of work.

    Raises:
        OutputError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror or error}"
        raise OutputError(msg) from error


def _ids(content: bytes, path: Path) -> list[int | str]:
    lines = content.splitlines()
    return [_id(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _id(line: bytes, where: str) -> int | str:
    try:
        name: int | str = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{where}: not a completion; name another output or remove the file"
        raise OutputError(msg) from error
    return name
