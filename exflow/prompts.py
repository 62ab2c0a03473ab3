"""Prompts to send to a server: text files or JSON Lines, among them Pile-format shards."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from exflow.record import Prompt, ServerError
from placement.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import TextIO


def read_prompts(paths: Sequence[Path], *, max_characters: int) -> Iterator[Prompt]:
    """One prompt a line of .txt, .jsonl or .jsonl.zst files.

    A JSON line has `prompt` or `text`, and perhaps `id` and `meta.pile_set_name`. A prompt without
    an id is named by its file and line.

    Raises:
        ServerError: naming the line that is no prompt.
    """
    for path in paths:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _prompt(path, number, line, max_characters)


def _open_text(path: Path) -> TextIO:
    if not path.is_file():
        msg = f"{path}: no such file of prompts"
        raise ServerError(msg)
    if path.suffix != ".zst":
        return path.open(encoding="utf-8")
    import zstandard

    reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
    return io.TextIOWrapper(reader, encoding="utf-8")


def _prompt(path: Path, number: int, line: str, max_characters: int) -> Prompt:
    name = f"{path.name}:{number}"
    if path.suffix == ".txt":
        return Prompt(name=name, text=line.strip()[:max_characters])
    try:
        data: Any = parse_json(line)
        text = data.get("prompt", data.get("text"))
        meta = data.get("meta") or {}
        if not isinstance(text, str) or not text:
            msg = "neither `prompt` nor `text`"
            raise TypeError(msg)
        domain = meta.get("pile_set_name", "")
    except (ValueError, TypeError, AttributeError) as error:
        msg = f'{path}, line {number}: not a prompt ({error}); expected {{"prompt": ...}}'
        raise ServerError(msg) from error
    return Prompt(name=str(data.get("id", name)), text=text[:max_characters], domain=str(domain))
