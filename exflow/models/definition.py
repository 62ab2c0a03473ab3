"""DecoderDefinition: what a decoder computes, whichever family its checkpoint is of."""

from __future__ import annotations

from dataclasses import dataclass, field

from exflow.errors import CheckpointError
from exflow.models.names import WeightNames
from exflow.models.parts import (
    Activation,
    FullAttention,
    LatentAttention,
    NormKind,
    Rope,
    Router,
    SharedExpert,
)


@dataclass(frozen=True, kw_only=True)
class DecoderDefinition:
    """A pre-norm decoder in which some layers have experts.

    Attributes:
        name: the model's name, which traces and plans carry.
        family: the `model_type` of its configuration.
        vocab_size: entries of the vocabulary.
        hidden_size: width of the residual stream.
        num_layers: decoder layers, dense ones included.
        norm: kind of every norm: RMS, or layer norm with a bias.
        norm_eps: epsilon of the norms.
        max_positions: positions a sequence may have.
        rope: rotary position embedding; None for learned positions, added to the embedding.
        attention: heads, their projections, and what the cache keeps.
        windows: per layer, how many positions back a token sees, itself included; None for all.
        moe_layer_ids: the layers that have experts; the others have one dense block.
        num_experts: logical experts per MoE layer.
        top_k: experts a token uses.
        router: how they are chosen and weighted.
        activation: between the two products of an expert, a shared expert and a dense block.
        expert_size: inner width of an expert.
        dense_size: inner width of a dense block.
        shared_expert: a block that every token of a MoE layer uses besides its experts, or None.
        tie_word_embeddings: whether the head is the embedding.
        eos_token_ids: tokens that end a text.
        bos_token_id: the token that texts begin with, if there is one.
        weights: the names of the tensors.
    """

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    norm: NormKind = "rms"
    norm_eps: float
    max_positions: int
    rope: Rope | None
    attention: FullAttention | LatentAttention
    windows: tuple[int | None, ...] = ()
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    router: Router
    activation: Activation = field(default_factory=Activation)
    expert_size: int
    dense_size: int
    shared_expert: SharedExpert | None = None
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    weights: WeightNames = field(default_factory=WeightNames)

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if not self.moe_layer_ids:
            msg = f"{self.name} has no MoE layer; expected a Mixture-of-Experts model"
            raise CheckpointError(msg)
        if self.attention.num_heads % self.attention.num_kv_heads:
            msg = (
                f"{self.name} has {self.attention.num_heads} query heads, which "
                f"{self.attention.num_kv_heads} key-value heads do not divide"
            )
            raise CheckpointError(msg)
        self._check_router()

    def _check_router(self) -> None:
        router = self.router
        if not 1 <= self.top_k <= self.num_experts:
            msg = f"{self.name} wants {self.top_k} of {self.num_experts} experts a token"
            raise CheckpointError(msg)
        if self.num_experts % router.num_groups or router.top_groups > router.num_groups:
            msg = (
                f"{self.name} wants {router.top_groups} of {router.num_groups} groups of its "
                f"{self.num_experts} experts"
            )
            raise CheckpointError(msg)
        eligible = self.num_experts // router.num_groups * router.top_groups
        if self.top_k > eligible:
            msg = f"{self.name} wants {self.top_k} experts of groups that have {eligible}"
            raise CheckpointError(msg)

    @property
    def kv_width(self) -> int:
        """Elements that the cache keeps of one token in one layer."""
        return self.attention.entry_width
