"""Which documents are profiled, and in which batches: the same on every rank, whoever runs them.

A batch is fixed by the corpus and the options alone, so a trace does not depend on the number of
ranks or on interruptions: a rank takes every batch whose number modulo the ranks is its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WINDOW = 16
"""Batches' worth of documents that are sorted by length together, to save padding."""


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """One document as the model reads it.

    Attributes:
        index: The document's number in the corpus.
        subset: Its Pile subset.
        token_ids: Its first tokens.
    """

    index: int
    subset: str
    token_ids: tuple[int, ...]

    def shortened(self, length: int | None) -> TokenizedText:
        """Its first `length` tokens; all of them for None."""
        return replace(self, token_ids=self.token_ids[:length])


class Budget:
    """Tokens that may still be recorded, in all and in each subset; None sets no limit."""

    def __init__(self, *, total: int | None, per_subset: int | None) -> None:
        self._total = total
        self._per_subset = per_subset
        self._spent: Counter[str] = Counter()

    def left(self, subset: str) -> int | None:
        """Tokens left for a text of a subset; None for no limit."""
        limits = []
        if self._total is not None:
            limits.append(self._total - self._spent.total())
        if self._per_subset is not None:
            limits.append(self._per_subset - self._spent[subset])
        return max(0, min(limits)) if limits else None

    def spend(self, subset: str, tokens: int) -> None:
        """Counts tokens that will be recorded."""
        self._spent[subset] += tokens

    def is_spent(self, subsets: Sequence[str]) -> bool:
        """Whether nothing is left for any of the subsets (for any at all, if none are named)."""
        return all(self.left(subset) == 0 for subset in subsets or [""])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents that run through the model together."""

    number: int
    texts: tuple[TokenizedText, ...]


def make_batches(texts: Iterable[TokenizedText], batch_size: int) -> Iterator[Batch]:
    """Groups texts of similar length, a window at a time."""
    rest = iter(texts)
    number = 0
    while window := list(itertools.islice(rest, WINDOW * batch_size)):
        window.sort(key=lambda text: (-len(text.token_ids), text.index))
        for start in range(0, len(window), batch_size):
            yield Batch(number=number, texts=tuple(window[start : start + batch_size]))
            number += 1
