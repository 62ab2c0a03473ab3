"""OLMoE: norms over the whole projection, clipped queries, keys and values, no dense layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import common_fields, full_attention, rope
from exflow.models.definition import DecoderDefinition
from exflow.models.parts import Router

if TYPE_CHECKING:
    from pathlib import Path


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of an `olmoe` checkpoint."""
    return DecoderDefinition(
        attention=full_attention(
            config, qk_norm="projection", bias=config.attention_bias, clip_qkv=config.clip_qkv
        ),
        rope=rope(config, folder),
        moe_layer_ids=tuple(range(config.num_hidden_layers)),
        num_experts=config.num_experts,
        router=Router(is_normalized=config.norm_topk_prob),
        expert_size=config.intermediate_size,
        **common_fields(config, folder, name),
    )
