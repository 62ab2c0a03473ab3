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
        typer.Option(
            help="coherent: tokens stay where their experts are; home: they return; "
            "auto: what costs least on --routing."
        ),
    ] = "coherent",
    coherence_domain: Annotated[
        int | None, typer.Option(help="Ranks that share keys and values; default all.")
    ] = None,
    routing: Annotated[
        Path | None, typer.Option(help="A trace of this model; --protocol auto counts on it.")
    ] = None,
    links: Annotated[
        Path | None, typer.Option(help="JSON of latencies and bandwidths for --protocol auto.")
    ] = None,
    dispatch: Annotated[
        str,
        typer.Option(
            help="flat; hierarchical: rows cross to a node once; replicated: every rank attends "
            "to all tokens, for small batches; auto: by the hosts, with --protocol auto by the "
            "links too."
        ),
    ] = "auto",
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
    kv_memory: Annotated[
        str | None,
        typer.Option(help="For keys and values on each rank: bytes like 2GiB, or tokens."),
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option(help="Prompt tokens a rank reads between two decode steps.")
    ] = 2048,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            help="On a GPU, record steps that are alike once and replay them; not with "
            "--metrics or --record-trace, which need every step's routing."
        ),
    ] = True,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends a text; may be repeated.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a rank that died or hangs ends the run.")
    ] = 600.0,
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
    from exflow.runtime.kv_budget import KvBudget
    from exflow.runtime.model import ModelOptions, routing_for
    from exflow.runtime.requests import SamplingParams

    routing = routing_for(protocol, routing)
    engine = EngineOptions(
        protocol="home" if routing else protocol,  # type: ignore[arg-type]  # it checks itself
        coherence_domain=coherence_domain,
        dispatch=dispatch,  # type: ignore[arg-type]
        batch_size=batch_size,
        kv_budget=KvBudget() if kv_memory is None else KvBudget.parse(kv_memory),
        prefill_chunk=prefill_chunk,
        cuda_graphs=cuda_graphs,
    )
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=max_new_tokens,
        ignore_eos=ignore_eos,
        stop=stop or (),
    )
    run_job(
        Job(
            model=ModelOptions(
                model=model,
                plan=plan,
                engine=engine,
                dtype=dtype,
                device=device,
                timeout=timeout,
                routing=routing,
                links=links,
            ),
            prompts=prompts,
            output=output,
            sampling=sampling,
            metrics=metrics,
            trace=record_trace,
        )
    )
