"""Pile-format corpora: shards of JSON lines with `text` and `meta.pile_set_name`, read as a stream.

    {"text": "...", "meta": {"pile_set_name": "Github"}}

A shard is a `.jsonl`, `.jsonl.zst` or `.jsonl.gz` file; the Pile's own are `.jsonl.zst`. Memory use
does not grow with the corpus: one compressed chunk and one line are held at a time.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from placement.errors import UserError
from placement.json_text import can_encode

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
CHUNK_BYTES = 1 << 16


class CorpusError(UserError):
    """A corpus that cannot be read: names the file and, where there is one, the line."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: The text.
        subset: Its `meta.pile_set_name`.
        source: The shard it stands in.
        line: Its line there, from 1.
        index: Its number among the documents read (of the wanted subsets), from 0, on any rank.
    """

    text: str
    subset: str
    source: str
    line: int
    index: int


@dataclass(kw_only=True)
class CorpusStats:
    """What a reading of the corpus came across; filled while documents are read.

    Attributes:
        subsets: Documents of each subset, wanted or not, before they are shared out to ranks.
        skipped: What was wrong with each line passed over, with its file and number.
    """

    subsets: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)


def find_shards(paths: Sequence[str | Path]) -> list[Path]:
    """The shards named by files, folders (searched through) and glob patterns, each once.

    Files of one folder or pattern come in the order of their names.

    Raises:
        CorpusError: if a path names nothing, or a file is no shard by its ending.
    """
    shards = [shard for path in paths for shard in _shards_of(path)]
    if not shards:
        msg = "no corpus was given; name files, folders or patterns of Pile-format shards"
        raise CorpusError(msg)
    return list(dict.fromkeys(shards))


def _shards_of(path: str | Path) -> list[Path]:
    if Path(path).is_dir():
        found = [p for p in sorted(Path(path).rglob("*")) if p.is_file() and _is_shard(p)]
    else:
        is_file = Path(path).is_file()
        found = [Path(path)] if is_file else [Path(p) for p in sorted(glob.glob(str(path)))]  # noqa: PTH207
        for shard in found:
            if not _is_shard(shard):
                msg = f"{shard}: not a Pile-format shard by its name; expected {_endings()}"
                raise CorpusError(msg)
    if not found:
        msg = (
            f"{path}: no Pile-format shards there; expected a file, folder or glob of {_endings()}"
        )
        raise CorpusError(msg)
    return found


def _is_shard(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _endings() -> str:
    return ", ".join(f"*{suffix}" for suffix in SUFFIXES)


def read_documents(
    paths: Sequence[str | Path],
    *,
    subsets: Collection[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    skip_bad_lines: bool = False,
    stats: CorpusStats | None = None,
) -> Iterator[Document]:
    """Stream the documents of a corpus, or one rank's share of them.

    Every rank reads the same lines and keeps document i if i modulo `world_size` is its rank, so a
    bad line is the same error on every rank.

    Args:
        paths: Shards, folders or glob patterns.
        subsets: Keep only documents of these Pile subsets; all if None.
        rank: This rank.
        world_size: Ranks that share the corpus.
        skip_bad_lines: Pass over lines that cannot be read; they are listed in `stats`.
        stats: Filled while reading.

    Raises:
        CorpusError: for a damaged archive, a malformed line, or no document at all.
    """
    stats = CorpusStats() if stats is None else stats
    index = 0
    for shard in find_shards(paths):
        for line, content in enumerate(read_lines(shard), start=1):
            if not content.strip():
                continue
            try:
                text, subset = _parse(content)
            except ValueError as error:
                reason = f"{shard}, line {line}: {error}"
                if not skip_bad_lines:
                    msg = f"{reason}; mend it or pass --skip-bad-lines"
                    raise CorpusError(msg) from error
                stats.skipped.append(reason)
                continue
            stats.subsets[subset] += 1
            if subsets is not None and subset not in subsets:
                continue
            if index % world_size == rank:
                yield Document(text=text, subset=subset, source=str(shard), line=line, index=index)
            index += 1
    if index == 0:
        raise CorpusError(_emptiness(paths, subsets, stats))


def _emptiness(
    paths: Sequence[str | Path], subsets: Collection[str] | None, stats: CorpusStats
) -> str:
    where = ", ".join(str(path) for path in paths)
    if stats.subsets and subsets is not None:
        wanted, seen = ", ".join(sorted(subsets)), ", ".join(sorted(stats.subsets))
        return f"{where}: no document of the subsets {wanted}; the corpus has: {seen}"
    lines = f" ({len(stats.skipped)} bad lines were skipped)" if stats.skipped else ""
    return f"{where}: the corpus holds no documents{lines}"


def _parse(content: bytes) -> tuple[str, str]:
    """Text and subset of a line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        msg = f"not UTF-8 (byte {error.start})"
        raise ValueError(msg) from error
    except json.JSONDecodeError as error:
        msg = f"not JSON ({error.msg} at column {error.colno})"
        raise ValueError(msg) from error
    except RecursionError as error:
        msg = "nested too deeply"
        raise ValueError(msg) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        msg = 'no string "text"'
        raise ValueError(msg)
    if not can_encode(text):
        msg = "the text holds half a surrogate pair"
        raise ValueError(msg)
    meta = record.get("meta")
    subset = meta.get("pile_set_name") if isinstance(meta, dict) else None
    if not isinstance(subset, str):
        msg = 'no string "meta.pile_set_name"'
        raise ValueError(msg)
    return text, subset


def read_lines(shard: Path) -> Iterator[bytes]:
    """The lines of a file that may be compressed, without their ends.

    Raises:
        CorpusError: naming the line from which on it cannot be read.
    """
    pending: list[bytes] = []
    line = 1
    try:
        for chunk in _read_chunks(shard):
            first, *rest = chunk.split(b"\n")
            pending.append(first)
            for piece in rest:
                yield b"".join(pending)
                line += 1
                pending = [piece]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        msg = f"{shard}, line {line}: the file cannot be read further: {error}"
        raise CorpusError(msg) from error
    if pending:
        yield b"".join(pending)


def _read_chunks(shard: Path) -> Iterator[bytes]:
    if shard.name.endswith(".zst"):
        yield from _decompress_zstandard(shard)
        return
    opener = gzip.open if shard.name.endswith(".gz") else open
    with opener(shard, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _decompress_zstandard(shard: Path) -> Iterator[bytes]:
    """All frames of a file; its stream reader would take a truncated one for the end.

    Raises:
        ValueError: if the data is damaged or ends within a frame.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame, is_open = decompressor.decompressobj(), False
    with shard.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            while data:
                try:
                    content = frame.decompress(data)
                except zstandard.ZstdError as error:
                    msg = f"damaged zstandard data ({error})"
                    raise ValueError(msg) from error
                is_open = not frame.eof
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield content
    if is_open:
        msg = "the archive is truncated"
        raise ValueError(msg)
