"""DeepSeek-V3: sigmoid gate with a correction bias, the best groups by their best two experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.definition import DecoderDefinition
from exflow.models.latent import latent_fields
from exflow.models.parts import Router

if TYPE_CHECKING:
    from pathlib import Path


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of a `deepseek_v3` checkpoint; its layers for several tokens are not read."""
    return DecoderDefinition(
        router=Router(
            score="sigmoid",
            is_normalized=bool(config.norm_topk_prob),
            scale=config.routed_scaling_factor,
            num_groups=config.n_group,
            top_groups=config.topk_group,
            group_score="best_two",
            has_correction=True,
            is_float32=True,
        ),
        **latent_fields(config, folder, name, is_interleaved=config.rope_interleave),
    )
