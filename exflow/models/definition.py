"""DecoderDefinition: what a decoder computes, whichever family its checkpoint is of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from exflow.errors import CheckpointError

QkNorm = Literal["none", "head", "projection"]


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """The names of a checkpoint's tensors; those below `layer` follow its prefix.

    Experts are stored one by one (`experts` + "7." + `gate` + ".weight") or fused into
    `experts` + "gate_up_proj" (experts, 2 x size, hidden) and `experts` + "down_proj".
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    attention: str = "self_attn."
    input_norm: str = "input_layernorm.weight"
    post_norm: str = "post_attention_layernorm.weight"
    dense: str = "mlp."
    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class DecoderDefinition:
    """A pre-norm decoder with rotary attention and gated (SwiGLU) experts.

    Attributes:
        name: the model's name, which traces and plans carry.
        family: the `model_type` of its configuration.
        vocab_size: entries of the vocabulary.
        hidden_size: width of the residual stream.
        num_layers: decoder layers, dense ones included.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        norm_eps: epsilon of every RMS norm.
        max_positions: positions a sequence may have.
        rope_frequencies: (head_dim / 2) inverse frequencies.
        rope_scaling: factor on the rotary cosines and sines.
        qk_norm: norm of queries and keys: over each head, over the whole projection, or none.
        attention_bias: whether the four attention projections have biases.
        clip_qkv: queries, keys and values are clipped to [-clip_qkv, clip_qkv].
        moe_layer_ids: the layers that have experts; the others have one dense block.
        num_experts: logical experts per MoE layer.
        top_k: experts a token uses.
        norm_topk_prob: whether the chosen experts' gate weights are scaled to sum to one.
        expert_size: inner width of an expert.
        dense_size: inner width of a dense block.
        tie_word_embeddings: whether the head is the embedding.
        eos_token_ids: tokens that end a text.
        weights: the names of the tensors.
    """

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope_frequencies: tuple[float, ...]
    rope_scaling: float
    qk_norm: QkNorm
    attention_bias: bool
    clip_qkv: float | None
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    expert_size: int
    dense_size: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    weights: WeightNames = field(default_factory=WeightNames)

    def __post_init__(self) -> None:
        if not self.moe_layer_ids:
            msg = f"{self.name} has no MoE layer; expected a Mixture-of-Experts model"
            raise CheckpointError(msg)
        if self.num_heads % self.num_kv_heads:
            msg = (
                f"{self.name} has {self.num_heads} query heads, which {self.num_kv_heads} "
                f"key-value heads do not divide"
            )
            raise CheckpointError(msg)
        if not 1 <= self.top_k <= self.num_experts:
            msg = f"{self.name} wants {self.top_k} of {self.num_experts} experts a token"
            raise CheckpointError(msg)

    @property
    def kv_width(self) -> int:
        """Elements of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim
