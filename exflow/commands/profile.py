"""`exflow profile`: records which experts a model uses on a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def profile(
    model: Annotated[str, typer.Argument(help="A bundled model's name, a folder or a hub id.")],
    corpus: Annotated[list[str], typer.Argument(help="Pile-format shards: files, folders, globs.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace to write.")],
    subset: Annotated[
        list[str] | None, typer.Option(help="Only this Pile subset; may be given again.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many tokens in all.")
    ] = None,
    tokens_per_subset: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many tokens of each subset.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="teacher-forced: every token of the text; decode: what follows it.")
    ] = "teacher-forced",
    max_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a document that are read (teacher-forced).")
    ] = 512,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a document that are its prompt (decode).")
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to record after each prompt (decode).")
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents that run together.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", show_default=True)
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output if it is there.")
    ] = False,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Count unreadable lines and pass over them.")
    ] = False,
) -> None:
    """Record which experts a Mixture-of-Experts model uses on a corpus.

    Works for any transformers MoE causal language model. Start it with torchrun to share the work
    between processes. A run that was killed takes up where it stopped when it is started again.
    """
    from exflow.profile import ProfileOptions
    from exflow.profile import profile as record

    options = ProfileOptions(
        mode=mode,  # type: ignore[arg-type]  # checked by ProfileOptions
        subsets=tuple(subset or ()),
        tokens=tokens,
        tokens_per_subset=tokens_per_subset,
        max_length=max_length,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        skip_bad_lines=skip_bad_lines,
    )
    trace = record(model, corpus, output, options=options, device=device, overwrite=overwrite)
    if trace is not None:
        typer.echo(
            f"{output}: {trace.num_tokens} tokens of {trace.num_sequences} documents, "
            f"{trace.num_layers} MoE layers, top-{trace.top_k} of {trace.num_experts} experts"
        )
