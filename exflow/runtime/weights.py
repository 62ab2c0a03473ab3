"""A rank's weights: the dense part, and the experts its plan gives it.

Shape suffixes: D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.runtime.attention_weights import read_attention
from exflow.runtime.expert_weights import read_dense, read_experts
from exflow.runtime.tensor_reader import TensorReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.models.checkpoint import Checkpoint
    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.attention_weights import FullWeights, LatentWeights
    from exflow.runtime.expert_weights import ExpertWeights
    from exflow.runtime.norms import NormWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterWeights:
    """A layer's gate.

    Attributes:
        weight: (D, experts).
        bias: (experts) of the logits.
        correction: (experts) float32, added to the scores for the choice only.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    correction: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One decoder layer. A MoE layer has `router` and `experts`, a dense one `dense`.

    Attributes:
        dense: a dense block, as one expert.
        shared: the shared expert of a MoE layer, alike.
        shared_gate: (D, 1) its gate.
    """

    input_norm: NormWeights
    attention: FullWeights | LatentWeights
    post_norm: NormWeights
    router: RouterWeights | None
    experts: ExpertWeights | None
    dense: ExpertWeights | None
    shared: ExpertWeights | None
    shared_gate: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderWeights:
    """All the weights of a rank.

    Attributes:
        embedding: (vocabulary, D).
        positions: (positions, D) learned positions, if the model has them.
        head: (D, vocabulary).
    """

    embedding: torch.Tensor
    positions: torch.Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm: NormWeights
    head: torch.Tensor


def load_weights(
    checkpoint: Checkpoint,
    definition: DecoderDefinition,
    slots: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderWeights:
    """Read the dense part of a checkpoint and a rank's own experts.

    Args:
        checkpoint: where to read.
        definition: the model.
        slots: slots[MoE layer] lists the logical experts of this rank.
        dtype: the number format to compute in.
        device: where the weights live.

    Raises:
        CheckpointError: a tensor is missing, damaged, or of another shape than the definition's.
    """
    reader = TensorReader(checkpoint=checkpoint, definition=definition, dtype=dtype, device=device)
    experts_of = dict(zip(definition.moe_layer_ids, slots, strict=True))
    names, hidden = definition.weights, definition.hidden_size
    wide = (definition.vocab_size, hidden)
    embedding = reader.read(names.embedding, wide)
    head = embedding if definition.tie_word_embeddings else reader.read(names.head, wide)
    positions = None
    if definition.rope is None:
        positions = reader.read(names.positions, (definition.max_positions, hidden))
    return DecoderWeights(
        embedding=embedding,
        positions=positions,
        layers=tuple(
            _read_layer(reader, layer, experts_of.get(layer))
            for layer in range(definition.num_layers)
        ),
        final_norm=reader.norm(names.final_norm, hidden),
        head=head.t(),
    )


def _read_layer(reader: TensorReader, layer: int, experts: Sequence[int] | None) -> LayerWeights:
    """Layer `layer`; with these experts, or dense if None."""
    definition, names = reader.definition, reader.definition.weights
    prefix, hidden = names.layer.format(layer=layer), definition.hidden_size
    shared = None if experts is None else definition.shared_expert
    is_gated = shared is not None and shared.is_gated
    dense = None
    if experts is None:
        dense = read_dense(reader, prefix + names.dense, definition.dense_size)
    return LayerWeights(
        input_norm=reader.norm(prefix + names.input_norm, hidden),
        attention=read_attention(reader, prefix + names.attention),
        post_norm=reader.norm(prefix + names.post_norm, hidden),
        router=None if experts is None else _read_router(reader, prefix),
        experts=None if experts is None else read_experts(reader, prefix + names.experts, experts),
        dense=dense,
        shared=read_dense(reader, prefix + names.shared, shared.size) if shared else None,
        shared_gate=reader.read(prefix + names.shared_gate, (1, hidden)).t() if is_gated else None,
    )


def _read_router(reader: TensorReader, prefix: str) -> RouterWeights:
    definition, names = reader.definition, reader.definition.weights
    router, experts = definition.router, definition.num_experts
    dtype = torch.float32 if router.is_float32 else None
    shape = (experts, definition.hidden_size)
    weight = reader.read(f"{prefix}{names.router}.weight", shape, dtype=dtype)
    correction = None
    if router.has_correction:
        correction = reader.read(prefix + names.correction, (experts,), dtype=torch.float32)
    return RouterWeights(
        weight=weight.t().contiguous(),
        bias=reader.bias(prefix + names.router, experts, is_there=router.has_bias),
        correction=correction,
    )
