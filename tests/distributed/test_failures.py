"""A rank that dies or hangs in the middle of decode: the others end in time, and nothing is lost."""

import json
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from exflow.runtime.completions import CompletionFile
from exflow.runtime.engine import EngineOptions
from exflow.runtime.job import Job, run_job
from exflow.runtime.model import ModelOptions
from exflow.runtime.requests import SamplingParams
from harness import _context
from tiny_checkpoints import qwen3_moe, save_byte_tokenizer

pytestmark = pytest.mark.distributed

NUM_RANKS = 3
NUM_REQUESTS = 24
TIMEOUT = 3.0
IN_TIME = TIMEOUT + 7.0  # what is promised: the timeout, and a few seconds to find out who


def run_rank(rank, port, job, outcome):
    """One process of a job, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(NUM_RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        run_job(job)
        outcome.write_text("done")
    except ValueError as error:
        outcome.write_text(f"{type(error).__name__}: {error}")


def start(job, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outcomes = [folder / f"outcome-{rank}" for rank in range(NUM_RANKS)]
    ranks = [
        _context().Process(target=run_rank, args=(rank, port, job, outcome), daemon=True)
        for rank, outcome in enumerate(outcomes)
    ]
    for outcome in outcomes:
        outcome.unlink(missing_ok=True)
    for rank in ranks:
        rank.start()
    return ranks, outcomes


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    qwen3_moe(folder / "tiny", vocab_size=256, num_hidden_layers=2)
    save_byte_tokenizer(folder / "tiny")
    prompts = [{"prompt": "x" * (1 + n % 9)} for n in range(NUM_REQUESTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def make_job(folder, output):
    return Job(
        model=ModelOptions(
            model=str(folder / "tiny"), engine=EngineOptions(batch_size=4), timeout=TIMEOUT
        ),
        prompts=folder / "prompts.jsonl",
        output=output,
        sampling=SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.7),
    )


def finish(job, folder):
    ranks, outcomes = start(job, folder)
    for rank in ranks:
        rank.join(60)
    assert [outcome.read_text() for outcome in outcomes] == ["done"] * NUM_RANKS


def by_id(path):
    found = [json.loads(line) for line in lines(path)]
    assert len({line["id"] for line in found}) == len(found), "a request is there twice"
    return {line["id"]: line["token_ids"] for line in found}


@pytest.fixture(scope="module")
def expected(folder):
    job = make_job(folder, folder / "whole.jsonl")
    finish(job, folder)
    return by_id(job.output)


def interrupt(job, folder, how, victim, moment):
    """Strike a rank after so many requests; how long the others took to end, what they said."""
    ranks, outcomes = start(job, folder)
    done = len(lines(job.output))
    wait_for(lambda: len(lines(job.output)) >= min(done + moment, NUM_REQUESTS - 6))
    os.kill(ranks[victim].pid, how)
    struck = time.monotonic()
    others = [rank for rank in range(NUM_RANKS) if rank != victim]
    for rank in others:
        ranks[rank].join(IN_TIME)
    took = time.monotonic() - struck
    alive = [rank for rank in others if ranks[rank].is_alive()]
    for rank in ranks:
        rank.kill()
        rank.join()
    assert not alive, f"ranks {alive} did not end"
    return took, [outcomes[rank].read_text() for rank in others if outcomes[rank].exists()]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_in_time_and_a_new_start_goes_on(folder, expected, tmp_path, how):
    rng = random.Random(int(how))
    job = make_job(folder, tmp_path / "out.jsonl")
    for victim in (1, 0):
        took, said = interrupt(job, folder, how, victim, rng.randrange(1, 8))
        assert took < IN_TIME
        for message in said:
            assert message.startswith("RankFailureError")
            assert f"rank {victim} was killed or hangs" in message
            assert "decode step" in message or "prefill step" in message
        assert len(said) == NUM_RANKS - 1
        assert expected.items() >= by_id_of_whole_lines(job.output).items()
    finish(job, folder)
    assert by_id(job.output) == expected


def by_id_of_whole_lines(path):
    whole = path.read_text()
    copy = Path(f"{path}.whole")
    copy.write_text(whole[: whole.rfind("\n") + 1])
    return by_id(copy)


def test_two_runs_do_not_write_the_same_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with CompletionFile(path), pytest.raises(ValueError, match="another run is writing it"):
        CompletionFile(path)
    with CompletionFile(path) as again:
        assert again.finished == []
