"""Qwen2-MoE: biased queries, keys and values, and a shared expert with a gate of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import (
    common_fields,
    full_attention,
    moe_layers_by_step,
    rope,
    windows_by_layer_type,
)
from exflow.models.definition import DecoderDefinition
from exflow.models.names import WeightNames
from exflow.models.parts import Router, SharedExpert

if TYPE_CHECKING:
    from pathlib import Path


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of a `qwen2_moe` checkpoint."""
    return DecoderDefinition(
        attention=full_attention(config, bias=config.qkv_bias, output_bias=False),
        windows=windows_by_layer_type(config),
        rope=rope(config, folder),
        moe_layer_ids=moe_layers_by_step(config),
        num_experts=config.num_experts,
        router=Router(is_normalized=config.norm_topk_prob),
        expert_size=config.moe_intermediate_size,
        shared_expert=SharedExpert(size=config.shared_expert_intermediate_size, is_gated=True),
        weights=WeightNames(shared="mlp.shared_expert."),
        **common_fields(config, folder, name),
    )
