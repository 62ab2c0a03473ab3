"""The tensors of an `exflow_gpt_moe` checkpoint, by its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

Shapes = dict[str, tuple[int, ...]]


def dense_shapes(config: Mapping[str, Any]) -> Shapes:
    """Shapes of all tensors but the experts', by name."""
    hidden, inner = config["n_embd"], config["n_inner"]
    everywhere = {
        **_norm("ln_1", hidden),
        **_linear("attn.c_attn", hidden, 3 * hidden),
        **_linear("attn.c_proj", hidden, hidden),
        **_norm("ln_2", hidden),
    }
    mlp = {**_linear("mlp.c_fc", hidden, inner), **_linear("mlp.c_proj", inner, hidden)}
    gate = {"mlp.gate.weight": (config["num_experts"], hidden)}
    shapes = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
        **_norm("transformer.ln_f", hidden),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["n_layer"]):
        has_experts = (layer + 1) % config["moe_every"] == 0
        layer_shapes = everywhere | (gate if has_experts else mlp)
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes


def expert_shapes(config: Mapping[str, Any], number: int) -> Shapes:
    """Shapes of the experts of a MoE layer, the `number`-th from 0, by name."""
    hidden, inner = config["n_embd"], config["n_inner"]
    shapes: Shapes = {}
    for expert in range(config["num_experts"]):
        prefix = f"transformer.h.{config['moe_every'] * (number + 1) - 1}.mlp.experts.{expert}"
        shapes |= _linear(f"{prefix}.c_fc", hidden, inner)
        shapes |= _linear(f"{prefix}.c_proj", inner, hidden)
    return shapes


def check_shapes(tensors: Mapping[str, torch.Tensor], expected: Shapes, where: str) -> None:
    """Refuse a tensor more or less than expected, or of another shape.

    Args:
        tensors: what was found.
        expected: shapes by name.
        where: the file, for the message.

    Raises:
        CheckpointError: naming the first.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            msg = (
                f"{where}: what becomes {name} has shape {found.get(name, 'nothing')}, "
                f"expected {expected.get(name, 'nothing')}"
            )
            raise CheckpointError(msg)


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
