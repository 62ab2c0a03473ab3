"""`exflow record`: collect routed experts from a running vLLM or SGLang server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def record(
    server: Annotated[str, typer.Option(help="Its address, as http://localhost:8000.")],
    prompts: Annotated[
        list[Path],
        typer.Option(help="Prompts: .txt, .jsonl, .jsonl.zst or .jsonl.gz; may be given again."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="JSON Lines to append to; then exflow import.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Name it serves; the first one if not given.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate a prompt.")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Send so many prompts at most.")] = None,
    max_characters: Annotated[int, typer.Option(min=1, help="Cut prompts after these.")] = 4000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for an answer.")] = 600,
) -> None:
    """Send prompts to a server and record the experts of every token.

    The server must run with --enable-return-routed-experts. Interrupted, start it again: prompts
    that have been answered are not sent a second time.
    """
    from itertools import islice

    from tqdm import tqdm

    from exflow.prompts import read_prompts
    from exflow.record import record as record_answers
    from exflow.server import find_server
    from placement.output import check_writable

    check_writable(output, inputs=prompts)
    running = find_server(server, model=model, max_tokens=max_tokens, timeout=timeout)
    wanted = list(islice(read_prompts(prompts, max_characters=max_characters), limit))
    with tqdm(total=len(wanted), unit="prompt", desc=running.model, disable=None) as bar:
        added = record_answers(
            running, wanted, output, concurrency=concurrency, on_answer=lambda n: bar.update(n)
        )
    typer.echo(f"{output}: {added} answers added, {len(wanted)} prompts wanted")
    typer.echo(
        f"next: exflow import --from {running.engine} {output} --config CONFIG -o trace.safetensors"
    )
