"""`exflow sample-corpus`: a small Pile-format corpus made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample_corpus(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Settles what is taken, and its order.")] = 0,
) -> None:
    """Write a Pile-format corpus from what Python itself brings and generated mathematics."""
    from exflow.sample_corpus import write_sample_corpus

    corpus = write_sample_corpus(output, seed=seed)
    for part, folder in corpus.folders.items():
        subsets = ", ".join(f"{name} {n}" for name, n in sorted(corpus.documents[part].items()))
        typer.echo(f"{folder}: {sum(corpus.documents[part].values())} documents ({subsets})")
    typer.echo(f"{corpus.num_characters / 1e6:.1f} million characters in all")
