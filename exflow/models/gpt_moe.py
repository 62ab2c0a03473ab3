"""GPT with experts in every second layer, one a token: the models of the ExFlow paper.

`transformers` has no such decoder (its Switch Transformer and NLLB-MoE have encoders), so the
checkpoint format is ours: GPT-2's tensors under GPT-2's names, and in a layer with experts

    transformer.h.1.mlp.gate.weight                 (experts, hidden)
    transformer.h.1.mlp.experts.7.c_fc.weight       (hidden, inner), .bias
    transformer.h.1.mlp.experts.7.c_proj.weight     (inner, hidden), .bias

in the place of `mlp.c_fc` and `mlp.c_proj`. An expert's output is weighted by its softmax
probability (Switch Transformers, section 2.1). `config.json` is GPT-2's with `model_type`
"exflow_gpt_moe", `num_experts`, `num_experts_per_tok` (1 unless given) and `moe_every` (2 unless
given: experts in layers 1, 3, 5, ...).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from exflow.models.config import eos_token_ids, refuse
from exflow.models.definition import DecoderDefinition
from exflow.models.names import WeightNames
from exflow.models.parts import Activation, FullAttention, Router

if TYPE_CHECKING:
    from pathlib import Path

MODEL_TYPE = "exflow_gpt_moe"
ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
NAMES = WeightNames(
    embedding="transformer.wte.weight",
    positions="transformer.wpe.weight",
    final_norm="transformer.ln_f",
    layer="transformer.h.{layer}.",
    attention="attn.",
    qkv="c_attn",
    output="c_proj",
    input_norm="ln_1",
    post_norm="ln_2",
    up="c_fc",
    down="c_proj",
    is_transposed=True,
)


def read_config(folder: Path) -> Any:
    """GPT-2's configuration with what ours has besides."""
    from transformers import GPT2Config

    return GPT2Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))


def define(config: Any, folder: Path, name: str) -> DecoderDefinition:
    """The definition of an `exflow_gpt_moe` checkpoint."""
    refuse(
        folder,
        {
            f"activation_function {config.activation_function!r} (supported: "
            f"{', '.join(ACTIVATIONS)})": config.activation_function not in ACTIVATIONS,
            "attention logits without scaling": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "cross-attention": config.add_cross_attention,
        },
    )
    inner = config.n_inner or 4 * config.n_embd
    moe_every = getattr(config, "moe_every", 2)
    return DecoderDefinition(
        name=name,
        family=MODEL_TYPE,
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        num_layers=config.n_layer,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        max_positions=config.n_positions,
        rope=None,
        attention=FullAttention(
            num_heads=config.n_head,
            num_kv_heads=config.n_head,
            head_dim=config.n_embd // config.n_head,
            qkv_bias=True,
            output_bias=True,
        ),
        moe_layer_ids=tuple(range(moe_every - 1, config.n_layer, moe_every)),
        num_experts=config.num_experts,
        top_k=getattr(config, "num_experts_per_tok", 1),
        router=Router(),
        activation=Activation(kind=ACTIVATIONS[config.activation_function], has_bias=True),
        expert_size=inner,
        dense_size=inner,
        tie_word_embeddings=config.tie_word_embeddings,
        eos_token_ids=eos_token_ids(config, folder),
        bos_token_id=config.bos_token_id,
        weights=NAMES,
    )
