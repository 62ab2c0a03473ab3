"""DeepSeek-V2: softmax gate, the best groups by their best expert, interleaved rotary pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exflow.models.config import refuse
from exflow.models.definition import DecoderDefinition
from exflow.models.latent import latent_fields
from exflow.models.parts import Router

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ("greedy", "group_limited_greedy")


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of a `deepseek_v2` checkpoint."""
    # What normalized weights would be scaled by differs between DeepSeek's code and transformers.
    refuse(
        folder,
        {
            f"topk_method {config.topk_method!r} (supported: {', '.join(METHODS)})": (
                config.topk_method not in METHODS
            ),
            "norm_topk_prob in a DeepSeek-V2 model": bool(config.norm_topk_prob),
            "mlp_bias": bool(config.mlp_bias),
        },
    )
    is_grouped = config.topk_method == "group_limited_greedy"
    return DecoderDefinition(
        router=Router(
            scale=config.routed_scaling_factor,
            num_groups=config.n_group if is_grouped else 1,
            top_groups=config.topk_group if is_grouped else 1,
            is_float32=True,
        ),
        **latent_fields(config, folder, name, is_interleaved=True),
    )
