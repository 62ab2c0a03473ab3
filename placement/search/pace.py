"""How far a search is, and whether it has to hurry.

Annealing that is cut off is worth nothing: hot layouts are worse than the one it began with. So a
search short of time skips steps all along its cooling, and always does the coldest ones.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Event


class Pace:
    """The time of one or several searches, one after the other.

    Args:
        time_limit: seconds from now in which searches should end; None: any time.
        interrupt: once set, searches end as soon as they can; None: never.
        shows: whether a bar on stderr says how far a phase is, if that is a terminal.
    """

    def __init__(
        self,
        *,
        time_limit: float | None = None,
        interrupt: Event | None = None,
        shows: bool = False,
    ) -> None:
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._interrupt = interrupt
        self._shows = shows
        self._skipped = 0
        self._begin = self._end = 0.0
        self._done = self._steps = 0
        self._cannot_stop = False
        self._bar = tqdm(disable=True)

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        return is_late or (self._interrupt is not None and self._interrupt.is_set())

    @property
    def was_hurried(self) -> bool:
        """Whether a step was left out or cut short."""
        return self._skipped > 0

    @contextmanager
    def phase(self, name: str, steps: int, *, share: float = 1.0) -> Iterator[None]:
        """A part of a search.

        Args:
            name: what the bar says.
            steps: of the cooling.
            share: of the time left that this part may take.
        """
        self._begin = time.monotonic()
        if self._deadline is not None:
            self._end = self._begin + share * max(0.0, self._deadline - self._begin)
        hidden = None if self._shows else True
        with tqdm(total=steps, desc=name, unit="step", leave=False, disable=hidden) as self._bar:
            self._done, self._steps = 0, steps
            yield

    def step(self, effort: float, *, is_needed: bool) -> float:
        """Counts a step; the effort to spend on it: 0 where it should be skipped.

        Args:
            effort: to spend if there is time.
            is_needed: it is done in any case, with an effort of at most 1 if time is short.
        """
        self._done += 1
        self._bar.update()
        self._cannot_stop = False
        if not self.is_over and not self._is_behind(self._done / self._steps):
            return effort
        self._skipped += 1
        self._cannot_stop = is_needed
        return min(1.0, effort) if is_needed else 0.0

    def pieces(self, moves: int, size: int) -> Iterator[int]:
        """The moves of a step in pieces, until there is no time left."""
        for first in range(0, moves, size):
            if self.is_over and not self._cannot_stop:
                self._skipped += 1
                return
            yield min(size, moves - first)

    def _is_behind(self, done: float) -> bool:
        """Whether more of the phase's time is gone than that share."""
        if self._deadline is None:
            return False
        return time.monotonic() - self._begin > done * (self._end - self._begin)
