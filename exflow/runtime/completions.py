"""The file of completions: a JSON line a finished request, written as it finishes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from typing import TYPE_CHECKING, Any, BinaryIO

from placement.json_text import JsonError, parse_json
from placement.output import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from exflow.runtime.prompts import Prompt
    from exflow.runtime.requests import Completion

BEGINNING = b'{"id": '
FIELDS = {"id", "prompt", "token_ids", "finish_reason"}


class CompletionFile:
    """Appends completions to a file, which may have some from an earlier run.

    Attributes:
        finished: the prompt of each request the file has a completion of, by the request's id.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there and open the file to append.

        A last line without its end was being written when the earlier run was killed: it is cut.
        Refusals are taken out: a run that grants more memory can do what another could not. The
        file is locked, so that no two runs append the same requests.

        Raises:
            OutputError: it cannot be written, or has lines that are no completions; nothing in it
                is changed then.
        """
        self._files = contextlib.ExitStack()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._files.enter_context(path.open("ab+"))
            _lock(self._file, path)
            self._file.seek(0)
            content = self._file.read()
            end = content.rfind(b"\n") + 1
            lines, torn = content[:end].splitlines(keepends=True), content[end:]
            found = [
                _completion(line, f"{path}, line {number}")
                for number, line in enumerate(lines, start=1)
            ]
            if not _is_torn(torn):
                _completion(torn, f"{path}, line {len(lines) + 1}")
            kept = [
                line
                for line, completion in zip(lines, found, strict=True)
                if completion["finish_reason"] != "refused"
            ]
            if len(kept) < len(lines):
                self._file = self._files.enter_context(_replace(path, b"".join(kept)))
            else:
                self._file.truncate(end)
        except OSError as error:
            self._files.close()
            msg = f"{path}: cannot be written: {error.strerror or error}"
            raise OutputError(msg) from error
        except OutputError:
            self._files.close()
            raise
        self.finished: dict[int | str, str] = {
            completion["id"]: completion["prompt"]
            for completion in found
            if completion["finish_reason"] != "refused"
        }
        self._path = path

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Refuse prompts whose ids belong to other prompts in the file.

        Raises:
            OutputError: naming one of them.
        """
        for prompt in prompts:
            if self.finished.get(prompt.id, prompt.text) != prompt.text:
                msg = (
                    f"{self._path} has the completion of another prompt with the id {prompt.id!r}; "
                    f"name another output, or give each prompt an id of its own"
                )
                raise OutputError(msg)

    def __enter__(self) -> CompletionFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()

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


def _replace(path: Path, content: bytes) -> BinaryIO:
    """A locked file with this content in place of another, under its name once it is whole."""
    path = path.resolve()
    partial = path.with_name(path.name + ".partial")
    file = partial.open("wb")
    _lock(file, path)
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
    partial.replace(path)
    return file


def _is_torn(line: bytes) -> bool:
    """Whether it is the beginning of a completion, or of nothing."""
    try:
        parse_json(line)
    except JsonError:
        return line.startswith(BEGINNING) or BEGINNING.startswith(line)
    return False


def _completion(line: bytes, where: str) -> dict[str, Any]:
    try:
        completion = parse_json(line)
        is_whole = completion.keys() >= FIELDS and type(completion["id"]) in (int, str)
    except (JsonError, AttributeError):
        is_whole = False
    if not is_whole:
        msg = f"{where}: not a completion; name another output or remove the file"
        raise OutputError(msg)
    return dict(completion)
