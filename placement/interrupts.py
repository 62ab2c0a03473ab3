"""Ctrl-C while a plan is searched for."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STDERR = 2
MESSAGE = b"\ninterrupted: the best plan so far will be written; again to stop at once\n"


@contextmanager
def best_on_interrupt(*, can_hurry: bool) -> Iterator[Event]:
    """Sets an event on the first Ctrl-C; the second ends the process.

    Where Ctrl-C is ignored, as in the background of a script, it goes on being ignored. Solvers do not listen to Ctrl-C and have nothing to show before their end: without `can_hurry`
    the first ends the process.
    """
    interrupt = Event()

    def hurry(*_: object) -> None:
        interrupt.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(STDERR, MESSAGE)  # print may be in the middle of a line

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, hurry if can_hurry else signal.SIG_DFL)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
