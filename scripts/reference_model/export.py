"""From trained parameters to a checkpoint that transformers loads unchanged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    from reference_model.model import ModelShape

END_OF_TEXT = "<|endoftext|>"


def configuration(shape: ModelShape) -> Qwen3MoeConfig:
    """The Qwen3-MoE configuration of a shape; routing weights are not renormalised over the top k."""
    return Qwen3MoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.hidden_size,
        moe_intermediate_size=shape.expert_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=1,
        head_dim=shape.head_width,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        decoder_sparse_step=1,
        norm_topk_prob=False,
        mlp_only_layers=[],
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def state_dict(params: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The parameters under the names of `Qwen3MoeForCausalLM`."""
    queries = shape.num_heads * shape.head_width
    state = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
    }
    for i in range(shape.num_layers):
        q, k, v = params[f"{i}.qkv"].split([queries, shape.head_width, shape.head_width])
        names = {
            "input_layernorm.weight": params[f"{i}.attention_norm"],
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.q_norm.weight": params[f"{i}.q_norm"],
            "self_attn.k_norm.weight": params[f"{i}.k_norm"],
            "self_attn.o_proj.weight": params[f"{i}.out"],
            "post_attention_layernorm.weight": params[f"{i}.expert_norm"],
            "mlp.gate.weight": params[f"{i}.router"],
            "mlp.experts.gate_up_proj": params[f"{i}.gate_up"],
            "mlp.experts.down_proj": params[f"{i}.down"],
        }
        state |= {f"model.layers.{i}.{name}": value for name, value in names.items()}
    return {name: value.detach().contiguous() for name, value in state.items()}


def export(params: dict[str, Tensor], shape: ModelShape, tokenizer: Path, out: Path) -> None:
    """Write config, bfloat16 weights and tokenizer."""
    model = Qwen3MoeForCausalLM(configuration(shape))
    missing = model.load_state_dict(state_dict(params, shape), strict=False).missing_keys
    assert missing == ["lm_head.weight"], missing
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(tokenizer)),
        eos_token=END_OF_TEXT,
        model_max_length=shape.max_positions,
    ).save_pretrained(out)
    for path in out.glob("*.json"):
        path.write_text(
            json.dumps(
                json.loads(path.read_text()),
                indent=1 if "config" in path.name else None,
                ensure_ascii=False,
            )
            + "\n"
        )
