"""Record routed experts from a running OpenAI-compatible server, prompt by prompt.

`record` sends prompts, and appends a JSON line an answer: what `exflow import` reads. A file that
is there already is gone on with: prompts it has answers to are not sent again.
"""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from exflow.server import RefusalError, ServerError
from placement.json_text import JsonError, parse_json
from placement.output import naming

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import FileIO
    from pathlib import Path

    from exflow.server import Prompt, Server

PATIENCE = 30.0
FIRST_REFUSALS = 8
SHOWN = 3
BEGINNING = b'{"id":'
FIELDS = {"id", "engine", "routed_experts"}

logger = logging.getLogger(__name__)


def record(
    server: Server,
    prompts: Iterable[Prompt],
    output: Path,
    *,
    concurrency: int = 8,
    on_answer: Callable[[int], None] = lambda count: None,
) -> int:
    """Send the prompts that `output` has no answer to yet, and append the answers.

    A prompt that the server refuses is passed over; the next run sends it again. At any other
    failure, and at Ctrl-C, nothing more is sent, nor asked again, and the answers on their way are
    still written: all of them, or after Ctrl-C those of the next 30 seconds.

    Args:
        server: from `find_server`.
        prompts: in the order to send them.
        output: a JSON Lines file; a half-written last line is dropped.
        concurrency: requests in flight.
        on_answer: called with 1 for every answer, and once with those that were there; from other
            threads, one at a time.

    Returns:
        Answers added.

    Raises:
        RefusalError: at the end, naming the prompts that were refused.
        ServerError: at the first prompt that fails otherwise, if the server has answered none and
            refuses the first `concurrency` (8 at least), or if the output answers another prompt
            under the same name.
        OutputError: the output cannot be written.
    """
    prompts = list(prompts)
    done = read_done(output)
    left = _left(prompts, done, output)
    on_answer(len(prompts) - len(left))
    with naming(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("ab", buffering=0)
    with file:
        recording = _Recording(
            server=server, output=output, file=file, on_answer=on_answer, is_answered=bool(done)
        )
        refused = _send_all(recording, iter(left), concurrency)
    if refused:
        shown = "; ".join(map(str, refused[:SHOWN])) + ("; ..." if len(refused) > SHOWN else "")
        msg = (
            f"{output}: {recording.added} answers added, {len(refused)} of {len(left)} prompts "
            f"refused, which another run sends again: {shown}"
        )
        raise RefusalError(msg)
    return recording.added


def _left(prompts: list[Prompt], done: dict[str, str | None], output: Path) -> list[Prompt]:
    """The prompts without an answer; one that was recorded under this name must be the same."""
    for prompt in prompts:
        text = str(done.get(prompt.name) or prompt.text)
        if text == prompt.text:
            continue
        if text.startswith(prompt.text) or prompt.text.startswith(text):
            msg = (
                f"{output}: prompt {prompt.name} was recorded with another --max-characters "
                f"({len(text)} characters, now {len(prompt.text)}); give the same, or name another "
                f"output"
            )
        else:
            msg = (
                f"{output} has the answer to another prompt with the id {prompt.name!r}; name "
                f"another output, or give each prompt an id of its own"
            )
        raise ServerError(msg)
    return [prompt for prompt in prompts if prompt.name not in done]


@dataclass(kw_only=True)
class _Recording:
    """The file, written by the threads that wait for answers, so that none is lost on its way."""

    server: Server
    output: Path
    file: FileIO
    on_answer: Callable[[int], None]
    is_answered: bool
    added: int = 0
    lock: Lock = field(default_factory=Lock)
    stop: Event = field(default_factory=Event)

    def answer(self, prompt: Prompt) -> None:
        line = self.server.complete(prompt, stop=self.stop)
        with self.lock:
            with naming(self.output):
                _append(self.file, line)
            self.added += 1
            self.is_answered = True
            self.on_answer(1)

    def launch(self, prompt: Prompt) -> Future[None]:
        """Answer in a daemon thread: the program may end while a server hangs."""
        future: Future[None] = Future()

        def run() -> None:
            try:
                self.answer(prompt)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        Thread(target=run, daemon=True).start()
        return future


def _send_all(
    recording: _Recording, prompts: Iterator[Prompt], concurrency: int
) -> list[RefusalError]:
    """Send with `concurrency` requests in flight; the refusals."""
    flying: set[Future[None]] = set()
    refused: list[RefusalError] = []
    try:
        while True:
            for prompt in islice(prompts, concurrency - len(flying)):
                flying.add(recording.launch(prompt))
            if not flying:
                return refused
            landed, flying = wait(flying, return_when=FIRST_COMPLETED)
            for error in (future.exception() for future in landed):
                if isinstance(error, RefusalError):
                    refused.append(error)
                    _consider(refused, recording, concurrency)
                elif error is not None:
                    raise error
    except BaseException as error:
        recording.stop.set()
        _await(flying, PATIENCE if isinstance(error, KeyboardInterrupt) else None)
        raise


def _consider(refused: list[RefusalError], recording: _Recording, concurrency: int) -> None:
    """Tell the first refusals; a server that has done nothing but refuse is given up."""
    if len(refused) <= SHOWN:
        logger.warning("refused: %s", refused[-1])
    if len(refused) >= max(concurrency, FIRST_REFUSALS) and not recording.is_answered:
        msg = (
            f"the first {len(refused)} prompts were all refused and no more are sent; do "
            f"--max-tokens and --max-characters fit the model? {refused[0]}"
        )
        raise ServerError(msg)


def _await(flying: set[Future[None]], seconds: float | None) -> None:
    if flying:
        logger.warning("waiting for requests on their way (%d); Ctrl-C gives them up", len(flying))
        wait(flying, timeout=seconds)


def read_done(output: Path) -> dict[str, str | None]:
    """The prompts a record has answers to, by name; a torn last line is cut off.

    The text of a prompt is None if the record does not tell it.
    """
    if not output.exists():
        return {}
    done: dict[str, str | None] = {}
    whole = 0
    with output.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and _is_torn(line):
                break
            answer = _answer_of(line, f"{output}, line {number}")
            done[str(answer["id"])] = answer.get("prompt")
            whole += len(line)
        file.truncate(whole)
    return done


def _is_torn(line: bytes) -> bool:
    """Whether a line without its end is an answer, or the beginning of one."""
    try:
        return set(parse_json(line)) >= FIELDS
    except JsonError:
        return line.startswith(BEGINNING[: len(line)])
    except TypeError:
        return False


def _answer_of(line: bytes, place: str) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = parse_json(line)
        is_answer = answer.keys() >= FIELDS
    except (JsonError, AttributeError):
        is_answer = False
    if not is_answer:
        msg = f"{place}: not a line of `exflow record`; name another output file"
        raise ServerError(msg)
    return answer


def _append(file: FileIO, line: dict[str, Any]) -> None:
    """Write a line, whole or not at all: another thread's would follow half a line."""
    data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
    start = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with suppress(OSError):
            file.truncate(start)
        raise
