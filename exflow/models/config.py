"""What families share when they read a Hugging Face configuration."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from exflow.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

# Frequencies that do not change with the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def common_fields(config: Any, folder: Path) -> dict[str, Any]:
    """The fields of a `DecoderDefinition` that mean the same in every family.

    Args:
        config: a `transformers` configuration.
        folder: the checkpoint's folder.

    Raises:
        CheckpointError: naming a feature that the decoder does not have.
    """
    _refuse_unsupported(config, folder)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, scaling = _rope(config, folder)
    return {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "norm_eps": config.rms_norm_eps,
        "max_positions": config.max_position_embeddings,
        "rope_frequencies": frequencies,
        "rope_scaling": scaling,
        "attention_bias": config.attention_bias,
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        "dense_size": config.intermediate_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_ids": _eos_token_ids(config, folder),
    }


def _refuse_unsupported(config: Any, folder: Path) -> None:
    refused = {
        f"hidden_act {config.hidden_act!r} (supported: silu)": config.hidden_act != "silu",
        "a sliding attention window": getattr(config, "sliding_window", None) is not None,
        "quantized weights": getattr(config, "quantization_config", None) is not None,
    }
    for feature, is_used in refused.items():
        if is_used:
            msg = f"{folder}: the runtime does not support {feature}"
            raise CheckpointError(msg)


def _rope(config: Any, folder: Path) -> tuple[tuple[float, ...], float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        msg = (
            f"{folder}: the runtime does not support rope_parameters {dict(parameters)}; "
            f"supported rope_type: {', '.join(ROPE_TYPES)}, over whole heads"
        )
        raise CheckpointError(msg)
    if rope_type != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
        return tuple(frequencies.tolist()), float(scaling)
    return _default_rope(config, float(parameters["rope_theta"])), 1.0


def _default_rope(config: Any, theta: float) -> tuple[float, ...]:
    import torch

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return tuple((1.0 / theta**exponents).tolist())


def _eos_token_ids(config: Any, folder: Path) -> tuple[int, ...]:
    """`generation_config.json` decides where there is one, as in `transformers`."""
    path = folder / "generation_config.json"
    found = config.eos_token_id
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
