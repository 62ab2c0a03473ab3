"""The reference models: a Qwen3-MoE language model as plain tensors, and its loss in plain PyTorch.

`transformers.Qwen3MoeForCausalLM` computes the same function (`export.py` renames the parameters), and
`kernels.py` the same loss and gradients, several times faster, on a CPU core with AVX-512.

Shape suffixes: T tokens of a micro-batch, B sequences, S sequence length, N query heads, H head width,
D hidden, F expert width, E experts, K experts per token, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ATTENTION = ("attention_norm", "qkv", "q_norm", "k_norm", "out", "expert_norm", "router")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model; every width is a multiple of 16."""

    num_experts: int
    top_k: int
    expert_width: int
    hidden_size: int = 96
    num_heads: int = 3
    head_width: int = 16
    num_layers: int = 8
    vocab_size: int = 4096
    sequence_length: int = 256
    max_positions: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch and what its loss is to be weighted with.

    Attributes:
        tokens_BS: input tokens.
        targets_BS: the tokens that follow.
        load_LE: share of every expert in the last global batches, for the balancing loss.
        balance: coefficient of the balancing loss.
        scale: the loss is multiplied by this before it is differentiated.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    load_LE: Tensor
    balance: float
    scale: float = 1.0


def init_parameters(shape: ModelShape, *, seed: int, router_std: float) -> dict[str, Tensor]:
    """Fresh parameters; matrices that write to the residual stream start smaller."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    D, width, E = shape.hidden_size, shape.expert_width, shape.num_experts
    queries, H = shape.num_heads * shape.head_width, shape.head_width
    out_scale = 1.0 / math.sqrt(2 * shape.num_layers)
    params = {"embed": normal(shape.vocab_size, D, std=0.05), "final_norm": torch.ones(D)}
    for i in range(shape.num_layers):
        params |= {
            f"{i}.attention_norm": torch.ones(D),
            f"{i}.qkv": normal(queries + 2 * H, D, std=D**-0.5),
            f"{i}.q_norm": torch.ones(H),
            f"{i}.k_norm": torch.ones(H),
            f"{i}.out": normal(D, queries, std=queries**-0.5 * out_scale),
            f"{i}.expert_norm": torch.ones(D),
            f"{i}.router": normal(E, D, std=router_std),
            f"{i}.gate_up": normal(E, 2 * width, D, std=D**-0.5),
            f"{i}.down": normal(E, D, width, std=width**-0.5 * out_scale * 2),
        }
    return params


def rope_tables(shape: ModelShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (S, H), in the half-rotation layout of transformers."""
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_width, 2) / shape.head_width)
    angle = torch.outer(torch.arange(length).float(), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def attention(x_BSD: Tensor, p: dict[str, Tensor], shape: ModelShape) -> Tensor:
    """Causal attention with one key-value head."""
    (B, S, _), N, H, eps = x_BSD.shape, shape.num_heads, shape.head_width, shape.norm_eps
    cos, sin = (table.to(x_BSD.device) for table in rope_tables(shape, S))
    q, k, v = (x_BSD @ p["qkv"].T).split([N * H, H, H], dim=-1)
    q = rotate(rms_norm(q.view(B, S, N, H).transpose(1, 2), p["q_norm"], eps), cos, sin)
    k = rotate(rms_norm(k, p["k_norm"], eps), cos, sin)[:, None].expand(B, N, S, H)
    v = v[:, None].expand(B, N, S, H)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).reshape(B, S, N * H) @ p["out"].T


def experts(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The chosen experts' outputs, weighted and summed; no token is dropped."""
    out_TD = torch.zeros_like(x_TD)
    for expert in range(len(p["down"])):
        token, choice = torch.where(ids_TK == expert)
        gate, up = (x_TD[token] @ p["gate_up"][expert].T).chunk(2, dim=-1)
        rows = (F.silu(gate) * up * weights_TK[token, choice, None]) @ p["down"][expert].T
        out_TD = out_TD.index_add(0, token, rows)
    return out_TD


def forward_backward(
    params: dict[str, Tensor], grads: dict[str, Tensor], batch: Batch, shape: ModelShape
) -> tuple[float, Tensor]:
    """Add the gradients of scale * (cross-entropy + balance * balancing loss) to `grads`.

    The balancing loss of a layer is E * sum over experts of load * mean probability (Switch
    Transformer, arXiv 2101.03961, equation 4) with the load of the last global batches: an expert may
    take all of a sequence's tokens, so experts can specialise by domain.

    Returns:
        The mean cross-entropy, and the routed tokens of every layer and expert (L, E).
    """
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    hidden, counts, balance = leaves["embed"][batch.tokens_BS], [], torch.zeros(())
    for i in range(shape.num_layers):
        p = {name.partition(".")[2]: v for name, v in leaves.items() if name.startswith(f"{i}.")}
        hidden = hidden + attention(rms_norm(hidden, p["attention_norm"], shape.norm_eps), p, shape)
        x_TD = rms_norm(hidden, p["expert_norm"], shape.norm_eps).flatten(0, 1)
        probs_TE = torch.softmax(x_TD @ p["router"].T, dim=-1)
        weights_TK, ids_TK = torch.topk(probs_TE, shape.top_k, dim=-1)
        hidden = hidden + experts(x_TD, weights_TK, ids_TK, p).view_as(hidden)
        balance = balance + (batch.load_LE[i] * probs_TE.mean(0)).sum() * shape.num_experts
        counts.append(torch.bincount(ids_TK.flatten(), minlength=shape.num_experts))
    logits = rms_norm(hidden, leaves["final_norm"], shape.norm_eps) @ leaves["embed"].T
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten())
    ((loss + batch.balance * balance) * batch.scale).backward()
    for name, leaf in leaves.items():
        grads[name] += leaf.grad
    return loss.item(), torch.stack(counts)
