"""Rewrite safetensors files: rename tensors and reorder their first dimension, as raw bytes.

Bytes are copied in pieces, so any number format works and a shard is never held in memory.
Format: 8 bytes little-endian length of a JSON header, the header, the tensors' bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from placement.interop.errors import ExportError
from placement.json_text import parse_json
from placement.output import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PIECE = 1 << 24
MAX_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor's entry: shape, and where its bytes are, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """What becomes of a tensor.

    Attributes:
        name: its new name.
        rows: row i of the new tensor is row rows[i] of the old one; None leaves them.
    """

    name: str
    rows: Sequence[int] | None = None


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors by name, the file's metadata, and where the bytes start.

    Raises:
        ExportError: if it is not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= MAX_HEADER else b""
        header = parse_json(text)
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: Tensor(
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=entry["data_offsets"][0],
                end=entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path}: not a safetensors file: {error!r}"
        raise ExportError(msg) from error
    return tensors, metadata, 8 + length


def rewrite(source: Path, target: Path, changes: Mapping[str, Change]) -> None:
    """Write `source` with its tensors changed; those that are not named stay as they are."""
    tensors, metadata, base = read_header(source)
    order = sorted(tensors.items(), key=lambda item: item[1].start)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    for name, tensor in order:
        new_name = changes[name].name if name in changes else name
        header[new_name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as old, replacing(target) as partial, partial.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in order:
            change = changes.get(name)
            _copy(old, new, base, tensor, None if change is None else change.rows)


def _copy(
    old: BinaryIO, new: BinaryIO, base: int, tensor: Tensor, rows: Sequence[int] | None
) -> None:
    if rows is None:
        _copy_bytes(old, new, base + tensor.start, tensor.end - tensor.start)
        return
    size = (tensor.end - tensor.start) // len(rows)
    for row in rows:
        _copy_bytes(old, new, base + tensor.start + row * size, size)


def _copy_bytes(old: BinaryIO, new: BinaryIO, start: int, count: int) -> None:
    old.seek(start)
    while count:
        piece = old.read(min(count, PIECE))
        if not piece:
            msg = f"{old.name}: ends {count} bytes early"
            raise ExportError(msg)
        new.write(piece)
        count -= len(piece)
