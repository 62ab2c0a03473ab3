"""A job: a model, a plan and prompts in; completions, metrics and a trace out.

What every rank can check by itself is checked before the ranks connect. What only one of them can
see (its shard of the weights, the files rank 0 writes) is agreed on before the first step.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from exflow.assets import resolve_model
from exflow.models.checkpoint import Checkpoint, checkpoint_folder
from exflow.models.families import define_model
from exflow.profiling.checkpoint import choose_device, load_tokenizer
from exflow.runtime.completions import CompletionFile, check_writable
from exflow.runtime.decoder import Decoder
from exflow.runtime.engine import Engine, EngineOptions
from exflow.runtime.prompts import Prompt, read_prompts
from exflow.runtime.ranks import Ranks
from exflow.runtime.recorder import DecodeRecorder
from exflow.runtime.requests import Completion, Request, SamplingParams
from exflow.runtime.summary import Clock, summarize
from exflow.runtime.weights import load_weights
from placement.errors import UserError
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from placement.traffic import PROTOCOLS

if TYPE_CHECKING:
    from exflow.models.definition import DecoderDefinition

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

logger = logging.getLogger(__name__)


class JobError(UserError):
    """Options that make no sense."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user asked for.

    Attributes:
        model: a bundled model's name, a folder or a hub id.
        prompts: the file of prompts.
        output: the file of completions; requests it already has are skipped.
        plan: the placement plan; None places experts in order.
        engine: protocol, domain and batch size.
        sampling: how tokens are chosen.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        device: "auto", "cpu", "cuda" or "cuda:N".
        metrics: where to write metrics.
        trace: where to write the routing of decode.
    """

    model: str
    prompts: Path
    output: Path
    plan: Path | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    dtype: str = "auto"
    device: str = "auto"
    metrics: Path | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        choices = {
            "protocol": (self.engine.protocol, PROTOCOLS),
            "dtype": (self.dtype, ("auto", *DTYPES)),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                msg = f"--{name} must be one of {', '.join(known)}; got {value!r}"
                raise JobError(msg)
        if self.engine.batch_size < 1:
            msg = f"--batch-size must be at least 1, got {self.engine.batch_size}"
            raise JobError(msg)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What every rank has found out by itself.

    Attributes:
        folder: the checkpoint.
        definition: the model.
        plan: a plan that fits it and the ranks.
        prompts: all prompts of the job.
        tokenizer: the model's.
        device: where this rank computes.
        dtype: the number format.
    """

    folder: Path
    definition: DecoderDefinition
    plan: PlacementPlan
    prompts: list[Prompt]
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype


def run_job(job: Job) -> None:
    """Run a job on this process's rank; all ranks of the job do the same.

    Raises:
        UserError: on every rank, if any of them cannot go on.
    """
    ranks = Ranks.from_environment()
    prepared = prepare(job, ranks)
    with ranks.connected(prepared.device):
        clock = Clock()
        with ranks.agreeing(prepared.device):
            checkpoint = Checkpoint(prepared.folder)
            decoder = _load(prepared, checkpoint, ranks)
            output = _open_output(job) if ranks.is_first else None
        finished = ranks.gather(None if output is None else output.finished, prepared.device)[0]
        requests = _make_requests(prepared, set(finished))
        clock.lap("load")
        recorder = DecodeRecorder(prepared.definition) if job.metrics or job.trace else None
        engine = Engine(decoder, prepared.plan, ranks, options=job.engine, recorder=recorder)
        completions = _complete(engine, requests, job, prepared, output)
        clock.lap("generate")
        if recorder is None or not requests:
            return
        trace = recorder.gather(ranks, prepared.device, source=job.prompts.name)
        summary = summarize(
            job,
            prepared,
            ranks,
            engine.metrics,
            completions,
            trace,
            seconds=clock.seconds,
            bytes_read=checkpoint.bytes_read,
        )
        if ranks.is_first:
            _write(job, summary, trace)


def prepare(job: Job, ranks: Ranks) -> Prepared:
    """Check all that needs no other rank.

    Raises:
        UserError: the model, the plan or the prompts cannot be used, or do not fit together.
    """
    device = torch.device(choose_device(job.device, ranks.local_rank))
    resolved = resolve_model(job.model)
    folder = checkpoint_folder(resolved)
    is_local = Path(resolved).is_dir()
    definition = define_model(folder, name=folder.resolve().name if is_local else job.model)
    plan = _linear_plan(definition, ranks) if job.plan is None else PlacementPlan.load(job.plan)
    plan.check_for(
        model=definition.name,
        num_experts=definition.num_experts,
        layer_ids=definition.moe_layer_ids,
        num_ranks=ranks.num_ranks,
    )
    plan.topology.domain_of_rank(job.engine.domain_size)
    default = "float32" if device.type == "cpu" else "bfloat16"
    return Prepared(
        folder=folder,
        definition=definition,
        plan=plan,
        prompts=read_prompts(job.prompts),
        tokenizer=load_tokenizer(str(folder)),
        device=device,
        dtype=DTYPES[default if job.dtype == "auto" else job.dtype],
    )


def _linear_plan(definition: DecoderDefinition, ranks: Ranks) -> PlacementPlan:
    """Experts in order, the same number on each rank as far as they go."""
    rank_of_expert = np.arange(definition.num_experts) * ranks.num_ranks // definition.num_experts
    layers = definition.moe_layer_ids
    return PlacementPlan.from_rank_of_expert(
        np.tile(rank_of_expert, (len(layers), 1)),
        model=definition.name,
        layer_ids=layers,
        topology=Topology(
            num_nodes=ranks.num_ranks // ranks.ranks_per_node, ranks_per_node=ranks.ranks_per_node
        ),
        strategy=Strategy(name="linear"),
    )


def _load(prepared: Prepared, checkpoint: Checkpoint, ranks: Ranks) -> Decoder:
    weights = load_weights(
        checkpoint,
        prepared.definition,
        [layer[ranks.rank] for layer in prepared.plan.slots],
        dtype=prepared.dtype,
        device=prepared.device,
    )
    return Decoder(prepared.definition, weights)


def _open_output(job: Job) -> CompletionFile:
    for path in (job.metrics, job.trace):
        if path is not None:
            check_writable(path)
    return CompletionFile(job.output)


def _make_requests(prepared: Prepared, finished: set[int | str]) -> list[Request]:
    waiting = [prompt for prompt in prepared.prompts if prompt.id not in finished]
    if len(waiting) < len(prepared.prompts):
        logger.debug("%d requests are finished already", len(prepared.prompts) - len(waiting))
    return [
        Request(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            token_ids=tuple(prepared.tokenizer(prompt.text, verbose=False)["input_ids"]),
        )
        for prompt in waiting
    ]


def _complete(
    engine: Engine,
    requests: list[Request],
    job: Job,
    prepared: Prepared,
    output: CompletionFile | None,
) -> list[Completion]:
    """Generate on all ranks; rank 0 writes and shows how far it is."""
    completions = []
    progress = tqdm(total=len(requests), unit="request", disable=None if output else True)
    start, num_tokens = time.perf_counter(), 0
    with progress:
        for completion in engine.generate(requests, job.sampling):
            completions.append(completion)
            if output is None:
                continue
            text = prepared.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            output.add(completion, text)
            num_tokens += len(completion.token_ids)
            rate = num_tokens / (time.perf_counter() - start)
            progress.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            progress.update()
    return completions


def _write(job: Job, summary: dict[str, Any], trace: Any) -> None:
    if job.metrics is not None:
        job.metrics.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    if job.trace is not None and trace is not None:
        trace.save(job.trace)
