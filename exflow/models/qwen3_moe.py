"""Qwen3-MoE: norms over each head, dense layers by step or by list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import common_fields
from exflow.models.definition import DecoderDefinition

if TYPE_CHECKING:
    from pathlib import Path


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of a `qwen3_moe` checkpoint."""
    moe_layers = tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    )
    return DecoderDefinition(
        name=name,
        qk_norm="head",
        clip_qkv=None,
        moe_layer_ids=moe_layers,
        expert_size=config.moe_intermediate_size,
        **common_fields(config, folder),
    )
