"""Prompts of a job: a JSON Lines file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.errors import UserError
from placement.json_text import JsonError, can_encode, parse_json


class PromptError(UserError):
    """A file of prompts that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of the file.

    Attributes:
        index: its number among the prompts, from 0.
        id: the line's `id`, else the index.
        text: the line's `prompt` or, as in the Pile, `text`.
    """

    index: int
    id: int | str
    text: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a file with a JSON object a line: `{"prompt": ...}` or `{"text": ...}`, maybe `id`.

    Raises:
        PromptError: naming the file, the line and what is wrong with it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read as prompts: {error}"
        raise PromptError(msg) from error
    prompts: list[Prompt] = []
    line_of_id: dict[int | str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse(line, len(prompts), where=f"{path}, line {number}")
        if prompt.id in line_of_id:
            first = line_of_id[prompt.id]
            msg = f"{path}, line {number}: id {prompt.id!r} is already used in line {first}"
            raise PromptError(msg)
        line_of_id[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        msg = f'{path}: no prompts; expected lines like {{"prompt": "Once upon a time"}}'
        raise PromptError(msg)
    return prompts


def _parse(line: str, index: int, *, where: str) -> Prompt:
    try:
        fields: Any = parse_json(line)
    except JsonError as error:
        msg = f"{where}: {error}"
        raise PromptError(msg) from error
    if not isinstance(fields, dict):
        fields = {}
    text, name = fields.get("prompt", fields.get("text")), fields.get("id", index)
    if not isinstance(text, str):
        msg = f'{where}: expected an object with a string "prompt" or "text"'
        raise PromptError(msg)
    if not can_encode(text) or not can_encode(str(name)):
        msg = f"{where}: the prompt or its id holds half a surrogate pair, which is no text"
        raise PromptError(msg)
    if not isinstance(name, (int, str)) or isinstance(name, bool):
        msg = f"{where}: id must be a string or a whole number, got {name!r}"
        raise PromptError(msg)
    return Prompt(index=index, id=name, text=text)
