"""`exflow bench`: what a plan and a protocol are worth on these ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    model: Annotated[str, typer.Argument(help="A bundled model's name, a folder or a hub id.")],
    prompts: Annotated[Path, typer.Option(help="JSON Lines: an object with prompt or text.")],
    plan: Annotated[
        Path | None, typer.Option(help="A plan of `exflow place`; without, experts in order only.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="New tokens of a request.")] = 33,
    repeats: Annotated[int, typer.Option(help="Repeats of each arm, by turns.")] = 3,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests in flight, over all ranks; default all.")
    ] = None,
    dispatch: Annotated[
        str,
        typer.Option(
            help="flat; hierarchical: rows cross to a node once; replicated: every rank attends "
            "to all tokens, for small batches; auto: by the hosts."
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    kv_memory: Annotated[
        str | None,
        typer.Option(help="For keys and values on each rank: bytes like 2GiB, or tokens."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a rank that died or hangs ends the run.")
    ] = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON instead.")
    ] = False,
) -> None:
    """Measure decode with home and coherent, with experts in order and as planned.

    Start it with torchrun, as `exflow run`. Each rank holds its experts twice: by both plans.
    """
    from exflow.bench import Bench, format_table, run_bench, to_line
    from exflow.runtime.engine import EngineOptions
    from exflow.runtime.kv_budget import KvBudget
    from exflow.runtime.model import ModelOptions
    from exflow.runtime.ranks import Ranks

    engine = EngineOptions(
        dispatch=dispatch,  # type: ignore[arg-type]  # it checks itself
        kv_budget=KvBudget() if kv_memory is None else KvBudget.parse(kv_memory),
    )
    result = run_bench(
        Bench(
            model=ModelOptions(
                model=model, plan=plan, engine=engine, dtype=dtype, device=device, timeout=timeout
            ),
            prompts=prompts,
            new_tokens=new_tokens,
            repeats=repeats,
            batch_size=batch_size,
        )
    )
    if Ranks.from_environment().is_first:
        typer.echo(to_line(result) if as_json else format_table(result))
