"""Liveness: which ranks still answer.

Every rank writes a beat into the job's store ten times a timeout, and reads those of the others.
A rank that has died or was stopped beats no more. The others notice it in two ways: the collective
they share with it fails (at once if it died, after the timeout if it hangs), and then the oldest
silence names the rank; or, should a collective never return, the process ends itself a few
seconds after the timeout. When the store itself falls silent, nobody is heard, and only whoever
holds it can be blamed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from exflow.runtime.errors import ContactLostError, RankFailureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.distributed_c10d import Store

GRACE_SECONDS = 5.0
BEATS = 10
MISSED_BEATS = 3
DONE = "done"
EXIT_CODE = 2


class Liveness:
    """This rank's beats, and what it knows of those of the others.

    Attributes:
        where: says what this rank is doing, for messages.
        is_broken: whether contact was lost; then no collective can work any more.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        rank: int,
        num_ranks: int,
        timeout: float,
        store_holder: str = "rank 0",
    ) -> None:
        """Nothing beats yet.

        Args:
            store: shared by all ranks, used by nobody else; None watches nobody.
            rank: this rank.
            num_ranks: how many there are.
            timeout: seconds of silence after which a rank is given up.
            store_holder: whose process the store is in, for messages.
        """
        self.where: Callable[[], str] = lambda: "start-up"
        self.is_broken = False
        self._store = store
        self._rank = rank
        self._timeout = timeout
        self._interval = min(1.0, timeout / BEATS)
        self._is_over = threading.Event()
        self._store_holder = store_holder
        now = time.monotonic()
        self._store_answered = now
        self._beats = {other: "" for other in range(num_ranks) if other != rank}
        self._heard = dict.fromkeys(self._beats, now)
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beats and watches for the duration."""
        if self._store is None:
            yield
            return
        self._thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            self._thread.join(timeout=self._interval)

    @contextlib.contextmanager
    def naming(self, advice: str = "start it again") -> Iterator[None]:
        """A collective that fails in the block ends it with an error that names the rank.

        Args:
            advice: what the user should do then.

        Raises:
            RankFailureError: which rank is lost, as far as it can be known, and at which step.
        """
        try:
            yield
        except ContactLostError as error:
            self.is_broken = True
            msg = (
                f"{self._blame()} (noticed at {self.where()}): no rank can go on without it; "
                f"{advice}"
            )
            raise RankFailureError(msg) from error

    def _blame(self) -> str:
        """Waits for missed beats, then says who is lost; the longest silence was the first."""
        if self._store is None:
            return "lost contact with another rank"
        deadline = time.monotonic() + (MISSED_BEATS + 1) * self._interval
        while time.monotonic() < deadline:
            time.sleep(self._interval / 4)
        lost, silence = self._longest_silence()
        if silence > MISSED_BEATS * self._interval:
            return f"{lost} was killed or hangs, silent for {silence:.1f} s"
        return f"a rank did not come to the same step within {self._timeout:g} s (--timeout)"

    def _longest_silence(self) -> tuple[str, float]:
        """Who was silent longest, and for how many seconds; the store's holder if it is silent."""
        now = time.monotonic()
        watched = {rank: at for rank, at in self._heard.items() if self._beats[rank] != DONE}
        is_ending = len(watched) < len(self._heard)
        if not is_ending and now - self._store_answered > MISSED_BEATS * self._interval:
            return self._store_holder, now - self._store_answered
        if not watched:
            return "no rank", 0.0
        lost = min(watched, key=lambda rank: watched[rank])
        return f"rank {lost}", now - watched[lost]

    def _run(self) -> None:
        count = 0
        while not self._is_over.wait(self._interval):
            count += 1
            # A store that was lost with its holder raises or blocks: its silence tells.
            with contextlib.suppress(RuntimeError):
                self._beat(str(count))
            lost, silence = self._longest_silence()
            if silence > self._timeout + GRACE_SECONDS:
                sys.stderr.write(
                    f"error: {lost} was killed or hangs, silent for {silence:.0f} s; "
                    f"noticed at {self.where()}; start the same command again\n"
                )
                sys.stderr.flush()
                os._exit(EXIT_CODE)
        with contextlib.suppress(RuntimeError):
            if not self.is_broken:
                self._beat(DONE)

    def _beat(self, value: str) -> None:
        assert self._store is not None
        self._store.set(str(self._rank), value)
        for other, last in self._beats.items():
            if not self._store.check([str(other)]):
                continue
            found = self._store.get(str(other)).decode()
            if found != last:
                self._beats[other] = found
                self._heard[other] = time.monotonic()
        self._store_answered = time.monotonic()
