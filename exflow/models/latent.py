"""What the DeepSeek families share: latent attention, shared experts, dense layers first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from exflow.models.config import common_fields, rope
from exflow.models.parts import LatentAttention, SharedExpert

if TYPE_CHECKING:
    from pathlib import Path

# DeepSeek's code gives the norms of the latent vectors this epsilon, whatever `rms_norm_eps` is.
LATENT_NORM_EPS = 1e-6


def latent_fields(config: Any, folder: Path, name: str, *, is_interleaved: bool) -> dict[str, Any]:
    """The fields of a `DecoderDefinition` that mean the same in DeepSeek-V2 and V3."""
    shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
    return common_fields(config, folder, name) | {
        "attention": LatentAttention(
            num_heads=config.num_attention_heads,
            query_rank=config.q_lora_rank,
            latent_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            scale=_scale(config),
            norm_eps=LATENT_NORM_EPS,
            has_bias=config.attention_bias,
        ),
        "rope": rope(config, folder, is_interleaved=is_interleaved),
        "moe_layer_ids": tuple(range(config.first_k_dense_replace, config.num_hidden_layers)),
        "num_experts": config.n_routed_experts,
        "expert_size": config.moe_intermediate_size,
        "shared_expert": SharedExpert(size=shared) if shared else None,
    }


def _scale(config: Any) -> float:
    """Of the logits; with YaRN also its `mscale_all_dim`, squared (DeepSeek-V2, section 3.1.4)."""
    scale = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    parameters = config.rope_parameters
    all_dim = parameters.get("mscale_all_dim", 0)
    if parameters.get("rope_type", "default") == "default" or not all_dim:
        return scale
    factor = parameters["factor"]
    mscale = 1.0 if factor <= 1 else 0.1 * all_dim * math.log(factor) + 1.0
    return scale * mscale * mscale
