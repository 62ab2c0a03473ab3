"""A GPT with top-1 experts in plain PyTorch: what the runtime's `exflow_gpt_moe` is tested against.

All but the experts is GPT-2 of `transformers`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import GPT2LMHeadModel


class SwitchExperts(nn.Module):
    """Every token through the expert with the largest probability, weighted by it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

        inner = config.n_inner or 4 * config.n_embd
        self.gate = nn.Linear(config.n_embd, config.num_experts, bias=False)
        self.experts = nn.ModuleList(GPT2MLP(inner, config) for _ in range(config.num_experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(hidden).softmax(-1).max(-1)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(hidden[chosen == number])
        return out * weights[..., None]


def build(config: dict[str, Any]) -> GPT2LMHeadModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt_config = GPT2Config(**(config | {"model_type": "gpt2"}))
    model = GPT2LMHeadModel(gpt_config)
    every = config.get("moe_every", 2)
    for block in model.transformer.h[every - 1 :: every]:
        block.mlp = SwitchExperts(gpt_config)
    return model.eval()


def load(folder: Path) -> GPT2LMHeadModel:
    from safetensors.torch import load_file

    model = build(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model


def save(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    from safetensors.torch import save_file

    config = {
        "model_type": "exflow_gpt_moe",
        "architectures": ["ExflowGptMoeForCausalLM"],
        "vocab_size": 128,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 4,
        "n_inner": 48,
        "n_positions": 256,
        "num_experts": 8,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif ".ln_" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=config["initializer_range"])
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
