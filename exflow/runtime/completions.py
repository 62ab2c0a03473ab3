"""The file of completions: a JSON line a finished request, written as it finishes."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from placement.json_text import JsonError, parse_json
from placement.output import OutputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from exflow.runtime.requests import Completion

BEGINNING = b'{"id": '
FIELDS = {"id", "prompt", "token_ids", "finish_reason"}


class CompletionFile:
    """Appends completions to a file, which may have some from an earlier run.

    Attributes:
        finished: ids of the requests whose completions the file has.
    """

    def __init__(
        self,
        path: Path,
        prompts: Mapping[int | str, str] = MappingProxyType({}),
        *,
        retried: Collection[int | str] = (),
    ) -> None:
        """Read what is there and open the file to append.

        A last line without its end was being written when the earlier run was killed: it is cut.
        The file is locked, so that no two runs append the same requests.

        Args:
            path: the file.
            prompts: the prompts of this run, by the ids of their requests.
            retried: requests that this run can do; if an earlier one refused them, that is
                taken out.

        Raises:
            OutputError: it cannot be written, or has lines that are no completions, or those of
                other prompts; nothing in it is changed then.
        """
        with contextlib.ExitStack() as files:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file: BinaryIO = files.enter_context(path.open("ab+"))
                _lock(self._file, path)
                self._file.seek(0)
                content = self._file.read()
                end = content.rfind(b"\n") + 1
                lines = content[:end].splitlines(keepends=True)
                found = _completions(lines, content[end:], path)
                _check_prompts(found, prompts, path)
                is_kept = [
                    done["finish_reason"] != "refused" or done["id"] not in retried
                    for done in found
                ]
                if all(is_kept):
                    self._file.truncate(end)
                else:
                    kept = b"".join(itertools.compress(lines, is_kept))
                    self._file = files.enter_context(_replace(path, kept))
            except OSError as error:
                msg = f"{path}: cannot be written: {error.strerror or error}"
                raise OutputError(msg) from error
            self.finished = {done["id"] for done in itertools.compress(found, is_kept)}
            self._files = files.pop_all()

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


def _completions(lines: Sequence[bytes], torn: bytes, path: Path) -> list[dict[str, Any]]:
    """The completions of a file's lines; its last, unfinished one must be the beginning of one."""
    found = [
        _completion(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)
    ]
    if not _is_torn(torn):
        _completion(torn, f"{path}, line {len(lines) + 1}")
    return found


def _check_prompts(
    found: Iterable[dict[str, Any]], prompts: Mapping[int | str, str], path: Path
) -> None:
    for done in found:
        if prompts.get(done["id"], done["prompt"]) != done["prompt"]:
            msg = (
                f"{path} has the completion of another prompt with the id {done['id']!r}; "
                f"name another output, or give each prompt an id of its own"
            )
            raise OutputError(msg)


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
