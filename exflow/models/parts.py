"""The parts of a DecoderDefinition in which families differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
QkNorm = Literal["none", "head", "projection"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        frequencies: inverse frequencies, half as many as the rotated elements of a head.
        scaling: factor on the cosines and sines.
        is_interleaved: the checkpoint has the two elements of a pair side by side, not half a
            head apart; weights are reordered when they are read.
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0
    is_interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class FullAttention:
    """Multi-head and grouped-query attention; the cache keeps each head's key and value.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        qk_norm: norm of queries and keys: over each head, over the whole projection, or none.
        qkv_bias: whether the projections to queries, keys and values have biases.
        output_bias: whether the output projection has one.
        clip_qkv: queries, keys and values are clipped to [-clip_qkv, clip_qkv].
        has_sinks: each head has a logit for attending to nothing.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    has_sinks: bool = False

    @property
    def scale(self) -> float:
        """Factor on the products of queries and keys."""
        return float(self.head_dim**-0.5)

    @property
    def key_dim(self) -> int:
        """Width of a cached key."""
        return self.head_dim

    @property
    def entry_width(self) -> int:
        """Elements that the cache keeps of a token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1).

    The cache keeps one latent vector and one rotated key for all heads. Attention runs in the
    absorbed form: queries are taken to the latent space, where the cached entry is both key and
    value, and what they find is taken to each head's values afterwards.

    Attributes:
        num_heads: query heads.
        query_rank: width of the queries' latent vector; None where they are projected directly.
        latent_rank: width of the keys' and values' latent vector.
        nope_dim: elements of a query head that positions do not rotate.
        rope_dim: elements that they do.
        value_dim: width of a value head.
        scale: factor on the products of queries and keys.
        norm_eps: epsilon of the latent vectors' norms.
        has_bias: whether the projections from and to the residual stream have biases.
    """

    num_heads: int
    query_rank: int | None
    latent_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    norm_eps: float
    has_bias: bool

    @property
    def num_kv_heads(self) -> int:
        """All heads attend to the same entry."""
        return 1

    @property
    def key_dim(self) -> int:
        """Width of a cached key."""
        return self.latent_rank + self.rope_dim

    @property
    def entry_width(self) -> int:
        """Elements that the cache keeps of a token."""
        return self.latent_rank + self.rope_dim


@dataclass(frozen=True, kw_only=True)
class Router:
    """How a token's experts are chosen from its logits, and weighted.

    Attributes:
        score: softmax over all experts, over the chosen ones only, or a sigmoid for each.
        is_normalized: the chosen experts' weights are scaled to sum to one.
        scale: factor on the weights.
        num_groups: equal groups of experts; a token uses experts of `top_groups` of them.
        top_groups: groups a token may use.
        group_score: a group counts as its best expert, or as the sum of its best two.
        has_bias: the logits have a bias.
        has_correction: a bias on the scores that counts for the choice but not for the weights.
        is_float32: computed in float32, whatever the model's number format.
    """

    score: Literal["softmax", "softmax_chosen", "sigmoid"] = "softmax"
    is_normalized: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    has_bias: bool = False
    has_correction: bool = False
    is_float32: bool = False


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What an expert does between its two products.

    Attributes:
        kind: "silu": silu(gate) * up. "clamped_silu": gate * sigmoid(alpha * gate) * (up + 1),
            both clamped. "gelu" and "gelu_tanh" have no gate.
        alpha: of "clamped_silu".
        limit: of "clamped_silu": gate at most this, up between minus and plus this.
        has_bias: whether the two products of an expert have biases.
    """

    kind: Literal["silu", "clamped_silu", "gelu", "gelu_tanh"] = "silu"
    alpha: float = 1.0
    limit: float = float("inf")
    has_bias: bool = False

    @property
    def num_inner(self) -> int:
        """How many times an expert's width its first product has: gate and up, or one."""
        return 2 if self.kind in ("silu", "clamped_silu") else 1


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """A block beside the experts; the rank that owns the token runs it.

    Attributes:
        size: its inner width.
        is_gated: a sigmoid of the token weights it.
    """

    size: int
    is_gated: bool = False
