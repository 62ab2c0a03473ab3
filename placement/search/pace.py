"""How far a search is, and whether it has to hurry.

Annealing that is cut off is worth nothing: hot layouts are worse than the one it began with. So a
search short of time skips steps all along its cooling, and does the coldest ones in any case.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
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
        self._begin = self._end = 0.0
        self._done = self._steps = 0
        self._needed = 0.0
        self._shown: Any = None
        self.was_hurried = False

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit of time."""
        return self._deadline is not None

    def is_over(self) -> bool:
        """Whether time is up; something is left out then, so the search was hurried."""
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        is_over = is_late or (self._interrupt is not None and self._interrupt.is_set())
        self.was_hurried = self.was_hurried or is_over
        return is_over

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
        self._done, self._steps = 0, steps
        with self._bar(name) as self._shown:
            yield

    def step(self, effort: float, *, is_needed: bool) -> float:
        """Counts a step; the effort to spend on it: 0 where it should be skipped.

        Args:
            effort: to spend if there is time.
            is_needed: it is done in any case, with an effort of at most 1 if time is short.
        """
        self._done += 1
        if self._shown is not None:
            self._shown.update()
        least = min(1.0, effort) if is_needed else 0.0
        if self.is_over() or self._is_behind():
            self.was_hurried = True
            effort = least
        self._needed = least / max(effort, least) if is_needed else 0.0
        return effort

    def pieces(self, moves: int, size: int) -> Iterator[int]:
        """The moves of a step in pieces, until there is no time left for more than is needed."""
        for first in range(0, moves, size):
            if first >= self._needed * moves and self.is_over():
                return
            yield min(size, moves - first)

    def _is_behind(self) -> bool:
        """Whether the phase has used more of its time than of its steps."""
        if self._deadline is None:
            return False
        due = self._done / self._steps * (self._end - self._begin)
        return time.monotonic() - self._begin > due

    def _bar(self, name: str) -> AbstractContextManager[Any]:
        if not self._shows:
            return nullcontext()
        bar: AbstractContextManager[Any] = tqdm(
            total=self._steps, desc=name, unit="step", leave=False, disable=None
        )
        return bar
