"""Prompts to send to a server: text files or JSON Lines, among them Pile-format shards."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from exflow.corpus import read_lines
from exflow.server import Prompt, ServerError
from placement.json_text import can_encode, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def read_prompts(paths: Sequence[Path], *, max_characters: int) -> Iterator[Prompt]:
    """One prompt a line of .txt, .jsonl, .jsonl.zst or .jsonl.gz files.

    A JSON line has `prompt` or `text`, and perhaps `id` and `meta.pile_set_name`. A prompt without
    an id is named by file and line: `a.txt:3`, or with the whole path if two files are an `a.txt`.

    Raises:
        ServerError: naming the line that is no prompt or has the id of another, or if there is no
            prompt at all.
        CorpusError: a file cannot be read.
    """
    place_of: dict[str, str] = {}
    files = Counter(path.name for path in paths)
    for path in paths:
        if not path.is_file():
            msg = f"{path}: no such file of prompts"
            raise ServerError(msg)
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            file = path.name if files[path.name] == 1 else path.resolve()
            prompt = _prompt(path, line, place, f"{file}:{number}", max_characters)
            if prompt.name in place_of:
                msg = f"{place}: the id {prompt.name!r} is already that of {place_of[prompt.name]}"
                raise ServerError(msg)
            place_of[prompt.name] = place
            yield prompt
    if not place_of:
        msg = f"{', '.join(map(str, paths))}: no prompts; expected a text or JSON object a line"
        raise ServerError(msg)


def _prompt(path: Path, line: bytes, place: str, name: str, max_characters: int) -> Prompt:
    domain = ""
    try:
        if path.suffix == ".txt":
            text: Any = line.decode("utf-8").strip()
        else:
            data: Any = parse_json(line)
            text = data.get("prompt", data.get("text"))
            name = _id(data, name)
            domain = str((data.get("meta") or {}).get("pile_set_name") or "")
        if not isinstance(text, str) or not text:
            msg = "neither `prompt` nor `text`"
            raise TypeError(msg)
        if not can_encode(f"{name}{text}{domain}"):
            msg = "half a surrogate pair is no text"
            raise ValueError(msg)
    except (ValueError, TypeError, AttributeError) as error:
        msg = f'{place}: not a prompt ({error}); expected {{"prompt": ...}}'
        raise ServerError(msg) from error
    return Prompt(name=name, text=text[:max_characters], domain=domain)


def _id(data: dict[str, Any], default: str) -> str:
    given = data.get("id")
    if given is None:
        return default
    if not isinstance(given, (int, str)) or isinstance(given, bool):
        msg = f"id must be a string or a whole number, got {given!r:.40}"
        raise TypeError(msg)
    return str(given)
