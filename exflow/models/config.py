"""What families share when they read a Hugging Face configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.errors import CheckpointError
from exflow.models.parts import FullAttention, Rope
from placement.json_text import JsonError, parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from exflow.models.parts import QkNorm

# Frequencies that do not change with the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def common_fields(config: Any, folder: Path, name: str) -> dict[str, Any]:
    """The fields of a `DecoderDefinition` that mean the same in every family.

    Args:
        config: a `transformers` configuration.
        folder: the checkpoint's folder.
        name: the model's name.

    Raises:
        CheckpointError: naming a feature that the decoder does not have.
    """
    refuse(
        folder,
        {
            f"hidden_act {config.hidden_act!r} (supported: silu)": config.hidden_act != "silu",
            "quantized weights": getattr(config, "quantization_config", None) is not None,
        },
    )
    return {
        "name": name,
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "max_positions": config.max_position_embeddings,
        "top_k": config.num_experts_per_tok,
        "dense_size": config.intermediate_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_ids": eos_token_ids(config, folder),
        "bos_token_id": config.bos_token_id,
    }


def refuse(folder: Path, features: dict[str, bool]) -> None:
    """Raise for the first feature that the checkpoint has.

    Raises:
        CheckpointError: naming it.
    """
    for feature, is_used in features.items():
        if is_used:
            msg = f"{folder}: the runtime does not support {feature}"
            raise CheckpointError(msg)


def full_attention(
    config: Any,
    *,
    qk_norm: QkNorm = "none",
    bias: bool = False,
    output_bias: bool | None = None,
    clip_qkv: float | None = None,
    has_sinks: bool = False,
) -> FullAttention:
    """Attention with the heads of a configuration; `output_bias` is `bias` unless given."""
    return FullAttention(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        qk_norm=qk_norm,
        qkv_bias=bias,
        output_bias=bias if output_bias is None else output_bias,
        clip_qkv=clip_qkv,
        has_sinks=has_sinks,
    )


def rope(config: Any, folder: Path, *, is_interleaved: bool = False) -> Rope:
    """The rotary embedding of a configuration.

    Raises:
        CheckpointError: frequencies that change with the text, or part of a head only.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        msg = (
            f"{folder}: the runtime does not support rope_parameters {dict(parameters)}; "
            f"supported rope_type: {', '.join(ROPE_TYPES)}, over whole heads"
        )
        raise CheckpointError(msg)
    if rope_type == "default":
        frequencies = _default_frequencies(config, float(parameters["rope_theta"]))
        return Rope(frequencies=frequencies, is_interleaved=is_interleaved)
    tensor, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
    return Rope(
        frequencies=tuple(tensor.tolist()), scaling=float(scaling), is_interleaved=is_interleaved
    )


def window_of_every_layer(config: Any) -> tuple[int | None, ...]:
    """One `sliding_window`, or none, for all layers."""
    window: int | None = getattr(config, "sliding_window", None)
    return (window,) * int(config.num_hidden_layers)


def windows_by_layer_type(config: Any) -> tuple[int | None, ...]:
    """The `sliding_window` of those layers whose type says so."""
    return tuple(
        config.sliding_window if layer_type == "sliding_attention" else None
        for layer_type in config.layer_types
    )


def moe_layers_by_step(config: Any) -> tuple[int, ...]:
    """Layers with experts where dense ones are given by step and by list (Qwen)."""
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    )


def eos_token_ids(config: Any, folder: Path) -> tuple[int, ...]:
    """`generation_config.json` decides where there is one, as in `transformers`."""
    path = folder / "generation_config.json"
    found = config.eos_token_id
    if path.is_file():
        try:
            found = parse_json(path.read_bytes()).get("eos_token_id")
        except (OSError, JsonError, AttributeError) as error:
            msg = f"{path} cannot be read: {error}"
            raise CheckpointError(msg) from error
    if found is None:
        return ()
    return tuple(map(int, found if isinstance(found, list) else [found]))


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _default_frequencies(config: Any, theta: float) -> tuple[float, ...]:
    import torch

    head_dim = _head_dim(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return tuple((1.0 / theta**exponents).tolist())
