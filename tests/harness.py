"""Real gloo ranks for tests: `run_ranks(4, function, *args)`.

Ranks are forked from one server process that has torch loaded (four start in a fraction of a
second, where fresh interpreters take more than ten) and meet through a `FileStore`, so no port is
needed. One rank runs without a process group, as `python -m exflow` does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing import connection, forkserver
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.context import ForkServerContext

PRELOAD = ["torch", "torch.distributed", "numpy", "pytest", "exflow.runtime.hops"]
GRACE_SECONDS = 2.0


class RankError(RuntimeError):
    """What happened on the ranks, with their tracebacks."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls `function(*args)` on every rank of a new gloo process group.

    The environment is torchrun's (RANK, WORLD_SIZE, ...) and each rank computes on one thread.

    Args:
        world_size: Number of ranks; one runs without a process group.
        function: A function at the top level of a module.
        args: Its arguments; they and the results are pickled.
        timeout: Seconds until ranks that have not finished are killed.

    Returns:
        The results by rank.

    Raises:
        Exception: The first exception of a rank, as raised there; its cause is a `RankError`.
        RankError: A rank died, or its exception cannot be pickled.
        TimeoutError: Ranks hung; the message shows where.
    """
    job = _Job.of(function, args)
    with tempfile.TemporaryDirectory(prefix="exflow-ranks-") as folder:
        group = _Group(world_size, folder=Path(folder), timeout=timeout)
        with _started(group, job) as ranks:
            return _collect(ranks, group)


@dataclass(frozen=True)
class _Job:
    """A call that knows its module's file: pytest may name test modules so that nobody can import them."""

    module_name: str
    module_file: str
    pickled_call: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...]) -> _Job:
        module = sys.modules[function.__module__]
        return cls(module.__name__, str(module.__file__), pickle.dumps((function, args)))

    def run(self) -> Any:
        if not _can_import(self.module_name):
            _import_file(self.module_name, self.module_file)
        function, args = pickle.loads(self.pickled_call)
        return function(*args)


@dataclass(frozen=True)
class _Group:
    world_size: int
    folder: Path
    timeout: float

    def stack_file(self, rank: int) -> Path:
        return self.folder / f"stack-{rank}"

    @contextlib.contextmanager
    def joined(self, rank: int) -> Iterator[None]:
        """The process group, for the rest of a rank's life."""
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_WORLD_SIZE=str(self.world_size),
        )
        if self.world_size == 1:
            yield
            return
        import torch.distributed as dist

        store = dist.FileStore(str(self.folder / "store"), self.world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout),
        )
        yield
        dist.barrier()  # gloo fails where a peer leaves while others are still connecting to it
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Rank:
    number: int
    process: Any
    answers: Any


@contextlib.contextmanager
def _started(group: _Group, job: _Job) -> Iterator[list[_Rank]]:
    context = _context()
    ranks = []
    try:
        for number in range(group.world_size):
            answers, sender = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(number, group, job, sender), daemon=True)
            process.start()
            sender.close()
            ranks.append(_Rank(number, process, answers))
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.answers.close()


@lru_cache(maxsize=1)
def _context() -> ForkServerContext:
    """A running fork server whose processes have torch, and one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def _main(number: int, group: _Group, job: _Job, sender: connection.Connection) -> None:
    """What a rank's process does: answers (True, result) or (False, (exception, traceback))."""
    import torch

    torch.set_num_threads(1)
    with group.stack_file(number).open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file)
        try:
            with group.joined(number):
                sender.send_bytes(pickle.dumps((True, job.run())))
        except BaseException as error:
            sender.send_bytes(_pickled_failure(error))


def _pickled_failure(error: BaseException) -> bytes:
    text = traceback.format_exc()
    with contextlib.suppress(Exception):
        answer = pickle.dumps((False, (error, text)))
        pickle.loads(answer)
        return answer
    return pickle.dumps((False, (None, text)))


def _collect(ranks: list[_Rank], group: _Group) -> list[Any]:
    """Waits for all results; after a failure, a moment longer for what the others say."""
    results: dict[int, Any] = {}
    failures: dict[int, tuple[BaseException | None, str]] = {}
    deadline = time.monotonic() + group.timeout
    waiting = {rank.answers: rank for rank in ranks}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for answers in ready:
            rank = waiting.pop(answers)
            succeeded, answer = _answer(rank)
            (results if succeeded else failures)[rank.number] = answer
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        _raise(failures)
    if waiting:
        raise TimeoutError(_describe_hang(list(waiting.values()), group))
    return [results[rank.number] for rank in ranks]


def _answer(rank: _Rank) -> tuple[bool, Any]:
    try:
        return pickle.loads(rank.answers.recv_bytes())
    except EOFError:
        rank.process.join()
        return False, (None, f"died with exit code {rank.process.exitcode}\n")


def _raise(failures: dict[int, tuple[BaseException | None, str]]) -> None:
    report = RankError("\n".join(f"rank {rank}: {text}" for rank, (_, text) in failures.items()))
    errors = [error for error, _ in failures.values()]
    if None in errors:  # a rank that died is why others fail, whoever was read first
        raise report
    raise errors[0] from report


def _describe_hang(ranks: list[_Rank], group: _Group) -> str:
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    stacks = [f"rank {rank.number}: {group.stack_file(rank.number).read_text()}" for rank in ranks]
    numbers = [rank.number for rank in ranks]
    return f"ranks {numbers} had not finished after {group.timeout} s\n" + "\n".join(stacks)


def _can_import(module_name: str) -> bool:
    if module_name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:
        return False


def _import_file(module_name: str, module_file: str) -> None:
    spec = importlib.util.spec_from_file_location(module_name, module_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    parents = module_name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
