"""Mixtral: experts in every layer, gate weights that sum to one, w1, w2 and w3 for their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import common_fields, full_attention, rope, window_of_every_layer
from exflow.models.definition import DecoderDefinition
from exflow.models.names import WeightNames
from exflow.models.parts import Router

if TYPE_CHECKING:
    from pathlib import Path

NAMES = WeightNames(gate="w1", up="w3", down="w2", renamed=("mlp.", "block_sparse_moe."))


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of a `mixtral` checkpoint."""
    return DecoderDefinition(
        attention=full_attention(config),
        windows=window_of_every_layer(config),
        rope=rope(config, folder),
        moe_layer_ids=tuple(range(config.num_hidden_layers)),
        num_experts=config.num_local_experts,
        router=Router(is_normalized=True),
        expert_size=config.intermediate_size,
        weights=NAMES,
        **common_fields(config, folder, name),
    )
