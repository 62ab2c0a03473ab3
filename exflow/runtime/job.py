"""A job: a model, a plan and prompts in; completions, metrics and a trace out.

What every rank can check by itself is checked before the ranks connect. What only one of them can
see (its shard of the weights, the files rank 0 writes) is agreed on before the first step.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exflow.models.checkpoint import Checkpoint
from exflow.runtime.agreement import check_same, digest_of
from exflow.runtime.completions import CompletionFile
from exflow.runtime.model import ModelOptions, PreparedModel, load_engine, prepare_model
from exflow.runtime.progress import with_progress
from exflow.runtime.prompts import Prompt, read_prompts
from exflow.runtime.ranks import Ranks
from exflow.runtime.recorder import DecodeRecorder
from exflow.runtime.requests import Completion, Request, SamplingParams
from exflow.runtime.summary import Clock, summarize
from placement.errors import UserError
from placement.output import check_writable, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from exflow.runtime.engine import Engine

logger = logging.getLogger(__name__)


class JobError(UserError):
    """A job that would destroy what it reads or writes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user asked for.

    Attributes:
        model: which model, its plan, and how to run it.
        prompts: the file of prompts.
        output: the file of completions; requests it already has are skipped.
        sampling: how tokens are chosen.
        metrics: where to write metrics.
        trace: where to write the routing of decode.
    """

    model: ModelOptions
    prompts: Path
    output: Path
    sampling: SamplingParams = field(default_factory=SamplingParams)
    metrics: Path | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        files = {
            "--prompts": self.prompts,
            "--plan": self.model.plan if isinstance(self.model.plan, Path) else None,
            "--routing": self.model.routing,
            "--links": self.model.links,
            "--output": self.output,
            "--metrics": self.metrics,
            "--record-trace": self.trace,
        }
        name_of_path: dict[Path, str] = {}
        for name, path in files.items():
            if path is None:
                continue
            other = name_of_path.setdefault(path.resolve(), name)
            if other != name and name in ("--output", "--metrics", "--record-trace"):
                msg = f"{other} and {name} are the same file, {path}: it would be overwritten"
                raise JobError(msg)


def run_job(job: Job) -> None:
    """Run a job on this process's rank; all ranks of the job do the same.

    Raises:
        UserError: on every rank, if any of them cannot go on.
    """
    ranks = Ranks.from_environment()
    prepared = prepare_model(job.model, ranks)
    prompts = read_prompts(job.prompts)
    requests = _make_requests(prepared, prompts, job.sampling)
    with (
        ranks.connected(prepared.device, timeout=job.model.timeout) as liveness,
        liveness.naming(
            "finished requests are written, start the same command again for the others"
        ),
        contextlib.ExitStack() as files,
    ):
        clock = Clock()
        recorder = DecodeRecorder(prepared.definition) if job.metrics or job.trace else None
        with ranks.agreeing(prepared.device):
            checkpoint = Checkpoint(prepared.folder)
            given = prepared.given(checkpoint) | _given(job, requests)
        check_same(given, ranks, prepared.device)
        with ranks.agreeing(prepared.device):
            engine = load_engine(prepared, checkpoint, ranks, recorder=recorder)
            output = None
            if ranks.is_first:
                output = files.enter_context(_open_output(job, requests, engine))
        liveness.where = lambda: engine.step
        found = ranks.gather(None if output is None else list(output.finished), prepared.device)[0]
        finished = set(found)
        requests = [request for request in requests if request.id not in finished]
        if ranks.is_first:
            _tell_what_is_left(job, len(requests), len(prompts))
        if requests:
            engine.connect()
        clock.lap("load")
        made = with_progress(engine.generate(requests), len(requests), is_shown=ranks.is_first)
        completions = _write_down(made, output)
        clock.lap("generate")
        if recorder is None or not requests:
            return
        trace = recorder.gather(
            ranks, prepared.device, source=job.prompts.name, foretell=engine.foretell
        )
        summary = summarize(
            prepared,
            ranks,
            engine.metrics,
            completions,
            trace,
            num_prompts=len(prompts),
            seconds=clock.seconds,
            bytes_read=checkpoint.bytes_read,
        )
        if ranks.is_first:
            _write(job, summary, trace)


def _given(job: Job, requests: list[Request]) -> dict[str, Any]:
    """What the ranks of a job must have been given alike, besides the model."""
    return {
        "prompts": digest_of((request.id, request.token_ids) for request in requests),
        "metrics": job.metrics is not None,
        "record-trace": job.trace is not None,
        **{option.name: getattr(job.sampling, option.name) for option in fields(job.sampling)},
    }


def _open_output(job: Job, requests: list[Request], engine: Engine) -> CompletionFile:
    for path in (job.metrics, job.trace):
        if path is not None:
            check_writable(path)
    return CompletionFile(
        job.output,
        {request.id: request.prompt for request in requests},
        retried={request.id for request in engine.can_run(requests)},
    )


def _tell_what_is_left(job: Job, num_left: int, num_prompts: int) -> None:
    if num_left == num_prompts:
        return
    logger.info("%s has %d of %d requests", job.output, num_prompts - num_left, num_prompts)
    for name, path in (("--metrics", job.metrics), ("--record-trace", job.trace)):
        if path is not None and num_left == 0:
            logger.warning("nothing is left to do, so %s is not written to %s", name, path)
        elif path is not None:
            logger.warning("%s will be of the other %d requests only", name, num_left)


def _make_requests(
    prepared: PreparedModel, prompts: list[Prompt], params: SamplingParams
) -> list[Request]:
    return [
        Request(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            token_ids=tuple(prepared.tokenizer(prompt.text, verbose=False)["input_ids"]),
            params=params,
        )
        for prompt in prompts
    ]


def _write_down(
    completions: Iterable[Completion], output: CompletionFile | None
) -> list[Completion]:
    """All completions; rank 0, which has the file, writes each as it comes."""
    made = []
    for completion in completions:
        if output is not None:
            output.add(completion)
        made.append(completion)
    return made


def _write(job: Job, summary: dict[str, Any], trace: Any) -> None:
    if job.metrics is not None:
        with replacing(job.metrics) as partial:
            partial.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    if job.trace is not None and trace is None:
        logger.warning("no decode step was made, so no routing is written to %s", job.trace)
    elif job.trace is not None:
        trace.save(job.trace)
