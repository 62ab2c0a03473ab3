"""gpt-oss: attention sinks, sliding windows, biased experts, softmax over the chosen experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import (
    common_fields,
    full_attention,
    refuse,
    rope,
    windows_by_layer_type,
)
from exflow.models.definition import DecoderDefinition
from exflow.models.names import WeightNames
from exflow.models.parts import Activation, Router

if TYPE_CHECKING:
    from pathlib import Path


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of a `gpt_oss` checkpoint; experts in MXFP4 are read as what they stand for."""
    quantization = getattr(config, "quantization_config", None)
    method = None if quantization is None else quantization.get("quant_method")
    refuse(folder, {f"weights quantized by {method}": method not in (None, "mxfp4")})
    config.quantization_config = None
    return DecoderDefinition(
        attention=full_attention(config, bias=config.attention_bias, has_sinks=True),
        windows=windows_by_layer_type(config),
        rope=rope(config, folder),
        moe_layer_ids=tuple(range(config.num_hidden_layers)),
        num_experts=config.num_local_experts,
        router=Router(score="softmax_chosen", has_bias=True),
        activation=Activation(
            kind="clamped_silu",
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
            has_bias=True,
        ),
        expert_size=config.intermediate_size,
        weights=WeightNames(router="mlp.router", fused_is_transposed=True),
        **common_fields(config, folder, name),
    )
