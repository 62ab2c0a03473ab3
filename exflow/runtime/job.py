"""A job: a model, a plan and prompts in; completions, metrics and a trace out.

What every rank can check by itself is checked before the ranks connect. What only one of them can
see (its shard of the weights, the files rank 0 writes) is agreed on before the first step.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exflow.models.checkpoint import Checkpoint
from exflow.runtime.completions import CompletionFile, check_writable
from exflow.runtime.model import ModelOptions, PreparedModel, load_engine, prepare_model
from exflow.runtime.progress import with_progress
from exflow.runtime.prompts import Prompt, read_prompts
from exflow.runtime.ranks import Ranks
from exflow.runtime.recorder import DecodeRecorder
from exflow.runtime.requests import Completion, Request, SamplingParams
from exflow.runtime.summary import Clock, summarize

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)


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


def run_job(job: Job) -> None:
    """Run a job on this process's rank; all ranks of the job do the same.

    Raises:
        UserError: on every rank, if any of them cannot go on.
    """
    ranks = Ranks.from_environment()
    prepared = prepare_model(job.model, ranks)
    prompts = read_prompts(job.prompts)
    with (
        ranks.connected(prepared.device, timeout=job.model.timeout) as liveness,
        liveness.naming(),
        contextlib.ExitStack() as files,
    ):
        clock = Clock()
        recorder = DecodeRecorder(prepared.definition) if job.metrics or job.trace else None
        with ranks.agreeing(prepared.device):
            checkpoint = Checkpoint(prepared.folder)
            engine = load_engine(prepared, checkpoint, ranks, recorder=recorder)
            output = files.enter_context(_open_output(job)) if ranks.is_first else None
        liveness.where = lambda: engine.step
        finished = ranks.gather(None if output is None else output.finished, prepared.device)[0]
        requests = _make_requests(prepared, prompts, job.sampling, set(finished))
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


def _open_output(job: Job) -> CompletionFile:
    for path in (job.metrics, job.trace):
        if path is not None:
            check_writable(path)
    return CompletionFile(job.output)


def _make_requests(
    prepared: PreparedModel,
    prompts: list[Prompt],
    params: SamplingParams,
    finished: set[int | str],
) -> list[Request]:
    waiting = [prompt for prompt in prompts if prompt.id not in finished]
    if len(waiting) < len(prompts):
        logger.debug("%d requests are finished already", len(prompts) - len(waiting))
    return [
        Request(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            token_ids=tuple(prepared.tokenizer(prompt.text, verbose=False)["input_ids"]),
            params=params,
        )
        for prompt in waiting
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
        job.metrics.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    if job.trace is not None and trace is not None:
        trace.save(job.trace)
