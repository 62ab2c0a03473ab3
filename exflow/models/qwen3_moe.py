"""Qwen3-MoE: norms over each head, dense layers by step or by list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import (
    common_fields,
    full_attention,
    moe_layers_by_step,
    rope,
    window_of_every_layer,
)
from exflow.models.definition import DecoderDefinition
from exflow.models.parts import Router

if TYPE_CHECKING:
    from pathlib import Path


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of a `qwen3_moe` checkpoint."""
    return DecoderDefinition(
        attention=full_attention(config, qk_norm="head", bias=config.attention_bias),
        windows=window_of_every_layer(config),
        rope=rope(config, folder),
        moe_layer_ids=moe_layers_by_step(config),
        num_experts=config.num_experts,
        router=Router(is_normalized=config.norm_topk_prob),
        expert_size=config.moe_intermediate_size,
        **common_fields(config, folder, name),
    )
