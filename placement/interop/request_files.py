"""Recordings with one request a line: what vLLM and SGLang answer, or `exflow record` wrote.

A line (or an element of a JSON array, or a whole file) is the body of a response. The routing is
found in `choices[].routed_experts` (vLLM), `sglext`, `choices[].sgl_ext` or `meta_info` (SGLang),
or `routed_experts` (`exflow record`).
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from placement.interop.arrays import load_npy
from placement.interop.errors import RecordError
from placement.interop.trace_parts import Request, TraceParts
from placement.json_text import JsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from placement.interop.model_shape import ModelShape
    from placement.interop.trace_parts import Phase
    from placement.trace import RoutingTrace

    Decode = Callable[[bytes, ModelShape, str], NDArray[Any]]

FIELD = "routed_experts"


def read_requests(
    paths: Sequence[Path], shape: ModelShape, decode: Decode, *, phase: Phase, source: str
) -> RoutingTrace:
    """A trace of all requests in JSON, JSON Lines or .npy files.

    Args:
        paths: the files; a .npy file is one request.
        shape: the model.
        decode: makes (tokens, layers, top_k) of the decoded base64 of a request.
        phase: which tokens to keep.
        source: written into the trace.

    Raises:
        RecordError: naming the request, its file and line.
    """
    parts = TraceParts(shape=shape, phase=phase, source=source)
    for path in paths:
        if path.suffix == ".npy":
            parts.add(Request(name=str(path), expert_ids=load_npy(path)))
            continue
        for place, body in _bodies(path):
            for request in _requests(place, body, shape, decode):
                parts.add(request)
    return parts.build()


def _bodies(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object of a file, with its place for errors."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.lstrip()[:1] == "[":
                    yield from _array(path)
                    return
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _object(line, place)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read: {error}"
        raise RecordError(msg) from error


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        bodies = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path}: neither JSON nor JSON Lines: {error}"
        raise RecordError(msg) from error
    for number, body in enumerate(bodies):
        place = f"{path}, element {number}"
        yield place, _checked(body, place)


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        body = parse_json(line)
    except JsonError as error:
        msg = f"{place}: {error}; expected one response a line"
        raise RecordError(msg) from error
    return _checked(body, place)


def _checked(body: Any, place: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        msg = f"{place}: expected an object, got {type(body).__name__}"
        raise RecordError(msg)
    return body


def _requests(
    place: str, body: dict[str, Any], shape: ModelShape, decode: Decode
) -> Iterator[Request]:
    """The requests of a response: one a choice."""
    meta, usage = (
        body[key] if isinstance(body.get(key), dict) else {} for key in ("meta_info", "usage")
    )
    identity = body.get("id") or meta.get("id")
    name = f"request {identity} ({place})" if identity is not None else f"request at {place}"
    encoded = list(find_routing(body))
    if not encoded:
        msg = f"{name} has no {FIELD}; start the server with --enable-return-routed-experts"
        raise RecordError(msg)
    prompt_tokens = body.get("prompt_tokens", meta.get("prompt_tokens", usage.get("prompt_tokens")))
    for text in encoded:
        yield Request(
            name=name,
            expert_ids=decode(_decode_base64(text, name), shape, name),
            start=body.get("routed_experts_start") or 0,
            prompt_tokens=prompt_tokens,
            model=body.get("model") or "",
            domain=body.get("domain") or "",
        )


def find_routing(body: dict[str, Any]) -> Iterator[object]:
    """The routing of the response as a whole, or else that of each choice, as it was sent."""
    whole = [body, body.get("meta_info"), body.get("sglext"), body.get("sgl_ext")]
    for holder in whole:
        if isinstance(holder, dict) and holder.get(FIELD) is not None:
            yield holder[FIELD]
            return
    choices = body.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            yield from find_routing({**choice, "choices": None})


def _decode_base64(text: object, name: str) -> bytes:
    try:
        if not isinstance(text, str):
            msg = f"text was expected, got {type(text).__name__}"
            raise TypeError(msg)
        return base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error, ValueError) as error:
        msg = f"{name}: {FIELD} is not valid base64: {error}"
        raise RecordError(msg) from error
