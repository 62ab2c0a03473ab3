"""Jobs of several ranks that tests strike: a rank killed or stopped, a link taken down."""

import ctypes
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from exflow.runtime.engine import EngineOptions
from exflow.runtime.job import Job, run_job
from exflow.runtime.model import ModelOptions
from exflow.runtime.requests import SamplingParams
from harness import _context
from tiny_checkpoints import qwen3_moe, save_byte_tokenizer

TIMEOUT = 3.0
IN_TIME = TIMEOUT + 7.0  # what is promised: the timeout, and a few seconds to find out who


@dataclass(frozen=True)
class Site:
    """Where ranks run: the namespace of each, if not the host's, and their environment."""

    num_ranks: int
    namespaces: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def make_folder(folder, num_requests):
    """A tiny checkpoint and prompts of mixed length."""
    qwen3_moe(folder / "tiny", vocab_size=256, num_hidden_layers=2)
    save_byte_tokenizer(folder / "tiny")
    prompts = [{"prompt": "x" * (1 + n % 9)} for n in range(num_requests)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def make_job(folder, output):
    return Job(
        model=ModelOptions(
            model=str(folder / "tiny"), engine=EngineOptions(batch_size=2), timeout=TIMEOUT
        ),
        prompts=folder / "prompts.jsonl",
        output=output,
        sampling=SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.7),
    )


def run_rank(rank, site, port, job, outcome):
    """One process of a job, as torchrun would start it; the outcome holds all that it says."""
    if site.namespaces:
        enter(site.namespaces[rank])
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(site.num_ranks), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(site.num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.update(site.environment)
    with outcome.open("w") as said:
        os.dup2(said.fileno(), 2)
        try:
            run_job(job)
            said.write("done")
        except ValueError as error:
            said.write(f"{type(error).__name__}: {error}")


def enter(namespace):
    """This process and all it starts use a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as file:
        if libc.setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def start(site, job, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outcomes = [folder / f"outcome-{rank}" for rank in range(site.num_ranks)]
    ranks = [
        _context().Process(target=run_rank, args=(rank, site, port, job, outcome), daemon=True)
        for rank, outcome in enumerate(outcomes)
    ]
    for outcome in outcomes:
        outcome.unlink(missing_ok=True)
    for rank in ranks:
        rank.start()
    return ranks, outcomes


def finish(site, job, folder):
    ranks, outcomes = start(site, job, folder)
    for rank in ranks:
        rank.join(60)
    assert [outcome.read_text()[-4:] for outcome in outcomes] == ["done"] * site.num_ranks


def interrupt(site, job, folder, *, strike, struck, moment):
    """Strike after so many more requests: seconds until the others ended, and what they said.

    Args:
        site: where ranks run.
        job: what they run.
        folder: for the outcomes.
        strike: called with the processes.
        struck: ranks that need not end by themselves.
        moment: requests to wait for, and seconds after them.
    """
    ranks, outcomes = start(site, job, folder)
    requests, pause = moment
    wanted = len(lines(job.output)) + requests
    deadline = time.monotonic() + 60
    while len(lines(job.output)) < wanted:
        assert time.monotonic() < deadline, [o.read_text() for o in outcomes if o.exists()]
        time.sleep(0.01)
    time.sleep(pause)
    strike(ranks)
    since = time.monotonic()
    others = [rank for rank in range(site.num_ranks) if rank not in struck]
    for rank in others:
        ranks[rank].join(max(0.0, since + IN_TIME - time.monotonic()))
    took = time.monotonic() - since
    alive = [rank for rank in others if ranks[rank].is_alive()]
    for rank in ranks:
        rank.kill()
        rank.join()
    assert not alive, f"ranks {alive} did not end"
    return took, {rank: outcomes[rank].read_text() for rank in others}


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def by_id(path):
    """Token ids of every request in the whole lines of an output; none is there twice."""
    text = path.read_text()
    found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    assert len({line["id"] for line in found}) == len(found), "a request is there twice"
    return {line["id"]: line["token_ids"] for line in found}
