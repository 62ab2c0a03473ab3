"""The weights of a layer's attention, laid out for `rows @ weight`, and how they are read.

Shape suffixes: D hidden size, H query heads, R width of the latent vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.models.parts import FullAttention, LatentAttention
from exflow.runtime.norms import NormWeights

if TYPE_CHECKING:
    from exflow.runtime.tensor_reader import TensorReader


@dataclass(frozen=True, kw_only=True, eq=False)
class FullWeights:
    """Attention whose heads have keys and values.

    Attributes:
        qkv: (D, queries + keys + values), the three projections side by side.
        qkv_bias: of the three.
        qk_norms: of queries and keys: none, one for each head, (query and key heads, head size), or
            two over the whole widths of all queries and of all keys.
        sinks: (H) logits for attending to nothing.
        output: (queries, D).
        output_bias: (D).
    """

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norms: tuple[NormWeights, ...]
    sinks: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentWeights:
    """Multi-head latent attention.

    Attributes:
        query_down: (D, query rank), or None where queries are projected directly.
        query_down_bias: of `query_down`.
        query_norm: of the queries' latent vector.
        query: (query rank or D, H * (nope + rope)).
        entry: (D, R + rope), to the latent vector and the key that is rotated.
        entry_bias: of `entry`.
        entry_norm: of the latent vector.
        key_up: (H, nope, R), from queries to the latent space.
        value_up: (H, R, value), from the latent space to values.
        sinks: None.
        output: (H * value, D).
        output_bias: (D).
    """

    query_down: torch.Tensor | None
    query_down_bias: torch.Tensor | None
    query_norm: NormWeights | None
    query: torch.Tensor
    entry: torch.Tensor
    entry_bias: torch.Tensor | None
    entry_norm: NormWeights
    key_up: torch.Tensor
    value_up: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor | None
    sinks: None = None


def read_attention(reader: TensorReader, prefix: str) -> FullWeights | LatentWeights:
    """The attention weights below `prefix`."""
    attention = reader.definition.attention
    if isinstance(attention, LatentAttention):
        return _read_latent(reader, prefix, attention)
    return _read_full(reader, prefix, attention)


def _read_full(reader: TensorReader, prefix: str, attention: FullAttention) -> FullWeights:
    queries = attention.num_heads * attention.head_dim
    qkv, qkv_bias = _read_qkv(reader, prefix, attention)
    output, output_bias = _read_output(reader, prefix, queries, has_bias=attention.output_bias)
    sinks = reader.read(f"{prefix}sinks", (attention.num_heads,)) if attention.has_sinks else None
    return FullWeights(
        qkv=qkv,
        qkv_bias=qkv_bias,
        qk_norms=_read_qk_norms(reader, prefix, attention),
        sinks=sinks,
        output=output,
        output_bias=output_bias,
    )


def _read_qkv(
    reader: TensorReader, prefix: str, attention: FullAttention
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The three projections side by side, and their biases."""
    hidden = reader.definition.hidden_size
    fused = reader.definition.weights.qkv
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if fused is not None:
        widths = {fused: queries + 2 * keys}
    weights = [reader.linear(prefix + name, width, hidden) for name, width in widths.items()]
    biases = [
        reader.bias(prefix + name, width, is_there=attention.qkv_bias)
        for name, width in widths.items()
    ]
    there = [bias for bias in biases if bias is not None]
    return torch.cat(weights).t().contiguous(), torch.cat(there) if there else None


def _read_output(
    reader: TensorReader, prefix: str, width: int, *, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    name, hidden = prefix + reader.definition.weights.output, reader.definition.hidden_size
    weight = reader.linear(name, hidden, width).t().contiguous()
    return weight, reader.bias(name, hidden, is_there=has_bias)


def _read_qk_norms(
    reader: TensorReader, prefix: str, attention: FullAttention
) -> tuple[NormWeights, ...]:
    if attention.qk_norm == "none":
        return ()
    size, is_by_head = attention.head_dim, attention.qk_norm == "head"
    heads = {"q": attention.num_heads, "k": attention.num_kv_heads}
    norms = [
        reader.norm(f"{prefix}{name}_norm", size if is_by_head else count * size)
        for name, count in heads.items()
    ]
    if not is_by_head:
        return tuple(norms)
    weights = [
        norm.weight.expand(count, size) for norm, count in zip(norms, heads.values(), strict=True)
    ]
    return (NormWeights(weight=torch.cat(weights), bias=None, eps=norms[0].eps),)


def _read_latent(reader: TensorReader, prefix: str, attention: LatentAttention) -> LatentWeights:
    hidden, eps = reader.definition.hidden_size, attention.norm_eps
    rank, heads = attention.latent_rank, attention.num_heads
    entry = reader.linear(f"{prefix}kv_a_proj_with_mqa", attention.entry_width, hidden)
    entry_bias = reader.bias(
        f"{prefix}kv_a_proj_with_mqa", attention.entry_width, is_there=attention.has_bias
    )
    up_width = attention.nope_dim + attention.value_dim
    up = reader.linear(f"{prefix}kv_b_proj", heads * up_width, rank).view(heads, up_width, rank)
    width = heads * attention.value_dim
    output, output_bias = _read_output(reader, prefix, width, has_bias=attention.has_bias)
    down, down_bias, norm, query = _read_latent_query(reader, prefix, attention)
    return LatentWeights(
        query_down=down,
        query_down_bias=down_bias,
        query_norm=norm,
        query=query,
        entry=_halve_pairs(reader, entry, rank).t().contiguous(),
        entry_bias=None if entry_bias is None else _halve_pairs(reader, entry_bias, rank),
        entry_norm=reader.norm(f"{prefix}kv_a_layernorm", rank, eps=eps),
        key_up=up[:, : attention.nope_dim].contiguous(),
        value_up=up[:, attention.nope_dim :].transpose(1, 2).contiguous(),
        output=output,
        output_bias=output_bias,
    )


def _read_latent_query(
    reader: TensorReader, prefix: str, attention: LatentAttention
) -> tuple[torch.Tensor | None, torch.Tensor | None, NormWeights | None, torch.Tensor]:
    """Down, its bias, norm and up; or only the last."""
    hidden, rank = reader.definition.hidden_size, attention.query_rank
    down = down_bias = norm = None
    size_in, name = hidden, f"{prefix}q_proj"
    if rank is not None:
        down = reader.linear(f"{prefix}q_a_proj", rank, hidden).t().contiguous()
        down_bias = reader.bias(f"{prefix}q_a_proj", rank, is_there=attention.has_bias)
        norm = reader.norm(f"{prefix}q_a_layernorm", rank, eps=attention.norm_eps)
        size_in, name = rank, f"{prefix}q_b_proj"
    head = attention.nope_dim + attention.rope_dim
    query = reader.linear(name, attention.num_heads * head, size_in)
    heads = query.view(attention.num_heads, head, size_in).transpose(0, 1)
    heads = _halve_pairs(reader, heads, attention.nope_dim).transpose(0, 1)
    return down, down_bias, norm, heads.reshape(-1, size_in).t().contiguous()


def _halve_pairs(reader: TensorReader, rows: torch.Tensor, start: int) -> torch.Tensor:
    """Bring the first elements of all pairs to the front of the rows from `start` on.

    Products of queries and keys stay what they are, because both are reordered alike.
    """
    rope = reader.definition.rope
    if rope is None or not rope.is_interleaved:
        return rows
    return torch.cat([rows[:start], rows[start::2], rows[start + 1 :: 2]])
