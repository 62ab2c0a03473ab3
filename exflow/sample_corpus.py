"""A small Pile-format corpus made on the spot, for trying things without a download.

Its text is what Python itself brings (documentation topics, module sources, their docstrings) and
generated mathematics. A topic or a module stands wholly in the profiling part or wholly in the
held-out part, so that what is measured on the second was not seen in the first.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import random
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

from exflow.corpus import SUFFIXES, CorpusError, read_lines
from placement.errors import UserError
from placement.output import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SPLITS = ("profile", "heldout")
HELD_OUT_SHARE = 0.25
MAX_CHARACTERS = 12_000
MIN_CHARACTERS = 300
NUM_MODULES = 300
NUM_MATHEMATICS = 80
QUESTIONS_A_DOCUMENT = 50
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3"}


class SampleCorpusError(UserError):
    """A sample corpus that cannot be made here."""


@dataclass(frozen=True, kw_only=True)
class SampleCorpus:
    """What was written.

    Attributes:
        folders: The folder of each part, "profile" and "heldout".
        documents: Documents of each part and subset.
        num_characters: Characters in all.
    """

    folders: Mapping[str, Path]
    documents: Mapping[str, Mapping[str, int]]
    num_characters: int


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One document; `origin` is the topic, module or exercise that settles its part."""

    subset: str
    origin: str
    text: str

    @property
    def split(self) -> str:
        digest = hashlib.sha256(self.origin.encode()).digest()
        return SPLITS[digest[0] < 256 * HELD_OUT_SHARE]


def write_sample_corpus(folder: str | Path, *, seed: int = 0) -> SampleCorpus:
    """Write `profile/` and `heldout/`, one `.jsonl.zst` shard each.

    The same Python and seed give the same files; they are written over nothing else.

    Args:
        folder: where to write.
        seed: settles which modules and exercises are taken, and the order of documents.

    Raises:
        SampleCorpusError: if this Python lacks its sources, or the folder has other shards.
        OutputError: if the folder cannot be written.
    """
    samples = [*_topics(), *_modules(seed), *_mathematics(seed)]
    random.Random(seed).shuffle(samples)
    folders = {split: Path(folder) / split for split in SPLITS}
    shards = {
        target / "00.jsonl.zst": _shard([sample for sample in samples if sample.split == split])
        for split, target in folders.items()
    }
    for path, content in shards.items():
        _check_same(path, content)
    for path, content in shards.items():
        with replacing(path) as partial:
            partial.write_bytes(zstandard.ZstdCompressor(level=3).compress(content))
    return SampleCorpus(
        folders=folders,
        documents={
            split: Counter(sample.subset for sample in samples if sample.split == split)
            for split in SPLITS
        },
        num_characters=sum(len(sample.text) for sample in samples),
    )


def _shard(samples: list[_Sample]) -> bytes:
    lines = [
        json.dumps(
            {
                "text": sample.text,
                "meta": {"pile_set_name": sample.subset, "origin": sample.origin},
            }
        )
        for sample in samples
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _check_same(path: Path, content: bytes) -> None:
    """Refuse a folder with another shard than `path`, or other documents in that one."""
    for shard in sorted(file for file in path.parent.rglob("*") if file.name.endswith(SUFFIXES)):
        if shard != path or not _holds(shard, content):
            msg = (
                f"{shard} has other documents, of another seed or Python, or not made here; remove "
                f"it or name another folder"
            )
            raise SampleCorpusError(msg)


def _holds(shard: Path, content: bytes) -> bool:
    """Whether a shard has this content, whichever release of zstandard compressed it."""
    try:
        return b"\n".join(read_lines(shard)) == content
    except CorpusError:
        return False


def _topics() -> Iterator[_Sample]:
    """The documentation topics behind `help("...")`."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        msg = "this Python has no documentation topics (module pydoc_data); install all of it"
        raise SampleCorpusError(msg) from error
    for name, text in sorted(topics.items()):
        for start in range(0, len(text), MAX_CHARACTERS):
            yield from _sample("Python Docs", f"topic {name}", text[start : start + MAX_CHARACTERS])


def _modules(seed: int) -> Iterator[_Sample]:
    """Sources of the standard library, and apart from them their docstrings."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(library.rglob("*.py")) if not EXCLUDED & set(path.parts)]
    if not paths:
        msg = f"this Python has no module sources in {library}; install its standard library"
        raise SampleCorpusError(msg)
    random.Random(seed).shuffle(paths)
    for path in paths[:NUM_MODULES]:
        origin = f"module {path.relative_to(library).as_posix()}"
        try:
            source = path.read_text(encoding="utf-8")
            docstrings = "\n\n".join(_docstrings(source))
        except (OSError, ValueError, SyntaxError):
            continue  # a source in another encoding or for another Python; there are plenty
        yield from _sample("Github", origin, source[:MAX_CHARACTERS])
        yield from _sample("Python Docstrings", origin, docstrings[:MAX_CHARACTERS])


def _docstrings(source: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            yield docstring


def _sample(subset: str, origin: str, text: str) -> Iterator[_Sample]:
    if len(text) >= MIN_CHARACTERS:
        yield _Sample(subset=subset, origin=origin, text=text)


def _mathematics(seed: int) -> Iterator[_Sample]:
    """Pages of exercises with answers, one kind a page."""
    kinds = sorted(EXERCISES)
    for number in range(NUM_MATHEMATICS):
        rng = random.Random(f"{seed} {number}")
        exercise = EXERCISES[kinds[number % len(kinds)]]
        lines = [line for _ in range(QUESTIONS_A_DOCUMENT) for line in exercise(rng)]
        yield _Sample(
            subset="DM Mathematics", origin=f"exercise {seed} {number}", text="\n".join(lines)
        )


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(-999, 999), rng.randint(-999, 999)
    asked, answer = rng.choice(
        [(f"{a} + {b}", a + b), (f"{a} - {b}", a - b), (f"{a} * {b}", a * b)]
    )
    return f"{rng.choice(['Calculate', 'What is', 'Work out'])} {asked}.", str(answer)


def _divisors(rng: random.Random) -> tuple[str, str]:
    factor = rng.randint(2, 40)
    a, b = factor * rng.randint(2, 90), factor * rng.randint(2, 90)
    if rng.random() < 0.5:
        return f"Calculate the highest common factor of {a} and {b}.", str(math.gcd(a, b))
    return f"What is the least common multiple of {a} and {b}?", str(math.lcm(a, b))


def _linear_equation(rng: random.Random) -> tuple[str, str]:
    name, a, x = rng.choice("bcdghkmnrtw"), rng.randint(2, 60), rng.randint(-30, 30)
    b = rng.randint(-200, 200)
    return f"Solve {a}*{name} + {b} = {a * x + b} for {name}.", str(x)


def _derivative(rng: random.Random) -> tuple[str, str]:
    name, powers = rng.choice("acfhquvz"), sorted(rng.sample(range(1, 7), 3), reverse=True)
    factors = [rng.randint(2, 50) for _ in powers]
    asked = " + ".join(f"{f}*{name}**{p}" for f, p in zip(factors, powers, strict=True))
    answer = " + ".join(f"{f * p}*{name}**{p - 1}" for f, p in zip(factors, powers, strict=True))
    return f"What is the derivative of {asked} with respect to {name}?", answer


def _base(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(10, 5000)
    base, digits = rng.choice([(2, f"{number:b}"), (8, f"{number:o}"), (16, f"{number:x}")])
    return f"What is {number} (base 10) in base {base}?", digits


def _sequence(rng: random.Random) -> tuple[str, str]:
    start, step, bend = rng.randint(-50, 50), rng.randint(-20, 20), rng.randint(-3, 3)
    terms = [start + step * n + bend * n * n for n in range(6)]
    shown = ", ".join(str(term) for term in terms[:5])
    return f"What is the next term in {shown}?", str(terms[5])


EXERCISES: Mapping[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": _arithmetic,
    "base": _base,
    "derivative": _derivative,
    "divisors": _divisors,
    "linear equation": _linear_equation,
    "sequence": _sequence,
}
