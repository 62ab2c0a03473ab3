"""`exflow run`: distributed decode with a placement plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    model: Annotated[str, typer.Argument(help="A bundled model's name, a folder or a hub id.")],
    prompts: Annotated[Path, typer.Option(help="JSON Lines: an object with prompt or text.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON Lines of completions.")],
    plan: Annotated[
        Path | None, typer.Option(help="A plan of `exflow place`; without, experts in order.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(help="coherent: tokens stay where their experts are; home: they return."),
    ] = "coherent",
    coherence_domain: Annotated[
        int | None, typer.Option(help="Ranks that share keys and values; default all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which a request ends.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end token.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Likeliest tokens with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="So many likeliest tokens; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of random choices.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Requests in flight, over all ranks.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    metrics: Annotated[
        Path | None, typer.Option(help="Write rows, bytes, messages and seconds as JSON.")
    ] = None,
    record_trace: Annotated[
        Path | None, typer.Option(help="Write the routing of decode as a trace to place.")
    ] = None,
) -> None:
    """Decode prompts with the experts spread over ranks.

    Start it with torchrun for several ranks. Requests that the output already has are skipped, so
    a run that was killed goes on when it is started again.
    """
    from exflow.runtime.engine import EngineOptions
    from exflow.runtime.job import Job, run_job
    from exflow.runtime.requests import SamplingParams

    run_job(
        Job(
            model=model,
            prompts=prompts,
            output=output,
            plan=plan,
            engine=EngineOptions(
                protocol=protocol,  # type: ignore[arg-type]  # checked by Job
                coherence_domain=coherence_domain,
                batch_size=batch_size,
            ),
            sampling=SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                max_new_tokens=max_new_tokens,
                ignore_eos=ignore_eos,
            ),
            dtype=dtype,
            device=device,
            metrics=metrics,
            trace=record_trace,
        )
    )
