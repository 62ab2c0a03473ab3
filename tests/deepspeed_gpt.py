"""A GPT under Megatron-DeepSpeed's names, with DeepSpeed's own MoE layer in every second block."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Sizes:
    vocab: int = 128
    hidden: int = 32
    heads: int = 4
    layers: int = 4
    inner: int = 48
    positions: int = 64
    experts: int = 4
    residual: bool = False


class Embedding(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocab, sizes.hidden)
        self.position_embeddings = nn.Embedding(sizes.positions, sizes.hidden)

    def forward(self, ids):
        return self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]


class Attention(nn.Module):
    """Queries, keys and values head by head."""

    def __init__(self, sizes):
        super().__init__()
        self.heads = sizes.heads
        self.query_key_value = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.dense = nn.Linear(sizes.hidden, sizes.hidden)

    def forward(self, hidden):
        mixed = self.query_key_value(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)
        context = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dense(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(sizes.hidden, sizes.inner)
        self.dense_4h_to_h = nn.Linear(sizes.inner, sizes.hidden)

    def forward(self, hidden):
        inner = nn.functional.gelu(self.dense_h_to_4h(hidden), approximate="tanh")
        return self.dense_4h_to_h(inner)


def make_moe(sizes, ep_size):
    """No dropping, no random choices."""
    from deepspeed.moe.layer import MoE

    return MoE(
        sizes.hidden,
        MLP(sizes),
        num_experts=sizes.experts,
        ep_size=ep_size,
        k=1,
        drop_tokens=False,
        min_capacity=0,
        use_rts=False,
        use_residual=sizes.residual,
    )


class Layer(nn.Module):
    def __init__(self, sizes, mlp):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(sizes.hidden)
        self.self_attention = Attention(sizes)
        self.post_attention_layernorm = nn.LayerNorm(sizes.hidden)
        self.mlp = mlp

    def forward(self, hidden):
        hidden = hidden + self.self_attention(self.input_layernorm(hidden))
        out = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + (out[0] if isinstance(out, tuple) else out)


class Encoder(nn.Module):
    def __init__(self, sizes, ep_size):
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(sizes, make_moe(sizes, ep_size) if number % 2 else MLP(sizes))
            for number in range(sizes.layers)
        )
        self.final_layernorm = nn.LayerNorm(sizes.hidden)


class LanguageModel(nn.Module):
    def __init__(self, sizes, ep_size):
        super().__init__()
        self.embedding = Embedding(sizes)
        self.encoder = Encoder(sizes, ep_size)


class Gpt(nn.Module):
    def __init__(self, sizes, ep_size):
        super().__init__()
        self.language_model = LanguageModel(sizes, ep_size)

    def forward(self, ids):
        model = self.language_model
        hidden = model.embedding(ids)
        for layer in model.encoder.layers:
            hidden = layer(hidden)
        hidden = model.encoder.final_layernorm(hidden)
        return hidden @ model.embedding.word_embeddings.weight.t()


def save_with_deepspeed(folder, sizes, ids, client_state=None):
    """Builds the model on this rank and the others, and lets DeepSpeed save it.

    Returns:
        The logits of `ids` by DeepSpeed's modules.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = Gpt(sizes, ep_size=world)
    for name, parameter in model.named_parameters():
        _initialize(name, parameter)
    config = {"train_batch_size": world, "train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    with torch.no_grad():
        logits = engine(ids)
    engine.save_checkpoint(str(folder), tag="step1", client_state=client_state or {})
    return logits


@torch.no_grad()
def _initialize(name, parameter):
    if "layernorm" in name and name.endswith("weight"):
        parameter.uniform_(0.5, 1.5)
    elif ".deepspeed_experts." in name:
        rank = torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(1000 * rank + sum(map(ord, name)))
        parameter.normal_(std=0.3, generator=generator)
    else:
        parameter.normal_(std=0.3)
