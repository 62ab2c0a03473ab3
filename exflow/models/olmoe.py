"""OLMoE: norms over the whole projection, clipped queries, keys and values, no dense layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import common_fields
from exflow.models.definition import DecoderDefinition

if TYPE_CHECKING:
    from pathlib import Path


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of an `olmoe` checkpoint."""
    return DecoderDefinition(
        name=name,
        qk_norm="projection",
        clip_qkv=config.clip_qkv,
        moe_layer_ids=tuple(range(config.num_hidden_layers)),
        expert_size=config.intermediate_size,
        **common_fields(config, folder),
    )
