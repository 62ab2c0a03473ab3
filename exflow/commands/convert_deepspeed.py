"""`exflow convert-deepspeed`: a DeepSpeed checkpoint of a GPT with experts, for our loader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_deepspeed(
    source: Annotated[Path, typer.Argument(help="The folder given to save_checkpoint, or a step.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, if the checkpoint has no arguments.")
    ] = None,
    activation: Annotated[
        str, typer.Option(help="gelu_new (Megatron's fused kind) or gelu.")
    ] = "gelu_new",
    norm_eps: Annotated[float, typer.Option(help="Epsilon of the norms.")] = 1e-5,
    eos_token_id: Annotated[int | None, typer.Option(help="The token that ends a text.")] = None,
) -> None:
    """Write a Megatron-DeepSpeed GPT-MoE checkpoint as safetensors that `exflow run` loads.

    Copy the model's tokenizer files into the new folder yourself.
    """
    from exflow.integrations.deepspeed_conversion import GptOptions
    from exflow.integrations.deepspeed_conversion import convert_deepspeed as convert

    options = GptOptions(
        num_heads=num_heads, activation=activation, norm_eps=norm_eps, eos_token_id=eos_token_id
    )
    config = convert(source, output, options)
    typer.echo(f"{output}: {config['num_experts']} experts a layer, {config['n_layer']} layers")
