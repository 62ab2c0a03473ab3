"""Tiny random checkpoints saved by transformers, and what transformers makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gpt_moe

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    # Large enough that logits differ from token to token: ties would make greedy tokens a matter
    # of rounding.
    "initializer_range": 0.3,
}
ATTENTION = {"num_key_value_heads": 2, "head_dim": 16}


def qwen3_moe(folder: Path, *, max_shard_size: str = "1GB", seed: int = 0, **changes: Any) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 32, "intermediate_size": 96}
    config = Qwen3MoeConfig(**(SMALL | ATTENTION | sizes | changes))
    return _save(Qwen3MoeForCausalLM, config, folder, max_shard_size, seed)


def olmoe(folder: Path, *, max_shard_size: str = "1GB", seed: int = 0, **changes: Any) -> Path:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    special = {"pad_token_id": 0, "eos_token_id": 1, "intermediate_size": 32}
    config = OlmoeConfig(**(SMALL | special | {"clip_qkv": 1.5} | changes))
    return _save(OlmoeForCausalLM, config, folder, max_shard_size, seed)


def mixtral(folder: Path, *, max_shard_size: str = "1GB", seed: int = 0, **changes: Any) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1}
    config = MixtralConfig(**(_renamed(SMALL, "num_local_experts") | ATTENTION | sizes | changes))
    return _save(MixtralForCausalLM, config, folder, max_shard_size, seed)


def qwen2_moe(folder: Path, *, max_shard_size: str = "1GB", seed: int = 0, **changes: Any) -> Path:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "intermediate_size": 96,
    }
    config = Qwen2MoeConfig(**(SMALL | sizes | changes))
    return _save(Qwen2MoeForCausalLM, config, folder, max_shard_size, seed)


LATENT = {
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def deepseek_v2(
    folder: Path, *, max_shard_size: str = "1GB", seed: int = 0, **changes: Any
) -> Path:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    choice = {"topk_method": "group_limited_greedy", "n_shared_experts": 2}
    config = DeepseekV2Config(**(_renamed(SMALL, "n_routed_experts") | LATENT | choice | changes))
    return _save(DeepseekV2ForCausalLM, config, folder, max_shard_size, seed)


def deepseek_v3(
    folder: Path, *, max_shard_size: str = "1GB", seed: int = 0, **changes: Any
) -> Path:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    choice = {"n_shared_experts": 1, "num_nextn_predict_layers": 0}
    config = DeepseekV3Config(**(_renamed(SMALL, "n_routed_experts") | LATENT | choice | changes))
    return _save(DeepseekV3ForCausalLM, config, folder, max_shard_size, seed)


def gpt_oss(folder: Path, *, max_shard_size: str = "1GB", seed: int = 0, **changes: Any) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"intermediate_size": 32, "sliding_window": 6, "eos_token_id": 1}
    config = GptOssConfig(**(_renamed(SMALL, "num_local_experts") | ATTENTION | sizes | changes))
    return _save(GptOssForCausalLM, config, folder, max_shard_size, seed)


# By family: what saves a checkpoint, and changes that bring out its differences.
FAMILIES = {
    "mixtral": (mixtral, {"sliding_window": 7}),
    "qwen2-moe": (qwen2_moe, {"mlp_only_layers": [1], "initializer_range": 0.2}),
    "qwen3-moe": (qwen3_moe, {"mlp_only_layers": [1]}),
    "olmoe": (olmoe, {"num_experts_per_tok": 3}),
    "deepseek-v2": (deepseek_v2, {}),
    "deepseek-v3": (deepseek_v3, {}),
    # At 0.3 the reference itself is 6e-6 from its own logits in float64.
    "gpt-oss": (gpt_oss, {"initializer_range": 0.2}),
    "gpt-top1": (gpt_moe.save, {}),
}


def _renamed(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    """The sizes with the number of experts under the name that a family gives it."""
    return {name if key == "num_experts" else key: value for key, value in sizes.items()}


def _save(model_class: Any, config: Any, folder: Path, max_shard_size: str, seed: int) -> Path:
    import torch

    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():  # norms and biases that do something
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.1 if name.endswith("bias") else 1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@dataclass(frozen=True)
class Reference:
    """What transformers computes for prompts: greedy tokens, and the logits they came from."""

    tokens: list[list[int]]
    logits: list[Any]


def decode_with_transformers(
    folder: Path, prompts: list[list[int]], new_tokens: int, *, ignore_eos: bool = False
) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM

    if '"exflow_gpt_moe"' in (folder / "config.json").read_text():
        model = gpt_moe.load(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if ignore_eos:
        model.generation_config.eos_token_id = None
    tokens, logits = [], []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(output.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(output.logits))
    return Reference(tokens, logits)


def make_prompts(lengths: list[int], *, vocab_size: int = 128, seed: int = 0) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, length).tolist() for length in lengths]


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer with one token a byte; needs a vocabulary of 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
