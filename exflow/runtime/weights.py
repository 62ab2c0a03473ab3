"""A rank's weights: the dense part, and the experts its plan gives it.

Shape suffixes: D hidden size, S slots (physical experts) of the rank, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.errors import CheckpointError
from exflow.runtime.experts import can_join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.models.checkpoint import Checkpoint
    from exflow.models.definition import DecoderDefinition


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """The physical experts of a rank at one layer, transposed for `rows @ weight`.

    Attributes:
        gate_up: (S, D, 2F), the gate's columns first.
        down: (S, F, D), contiguous.
        joined: (D, 2SF) the gates of all slots, then their ups, if the experts are small.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    joined: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One decoder layer. A MoE layer has `router` and `experts`, a dense one `dense`.

    Attributes:
        qkv: (D, queries + keys + values), the three projections side by side.
        qk_norm: (query and key heads, head size) norm weights.
        output: (queries, D).
        router: (D, experts).
        dense: gate, up and down as one expert.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    router: torch.Tensor | None
    experts: ExpertWeights | None
    dense: ExpertWeights | None


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderWeights:
    """All the weights of a rank.

    Attributes:
        embedding: (vocabulary, D).
        head: (D, vocabulary).
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
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
    reader = _Reader(checkpoint, definition, dtype=dtype, device=device)
    experts_of = dict(zip(definition.moe_layer_ids, slots, strict=True))
    names = definition.weights
    wide = (definition.vocab_size, definition.hidden_size)
    embedding = reader.read(names.embedding, wide)
    head = embedding if definition.tie_word_embeddings else reader.read(names.head, wide)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(
            reader.layer(layer, experts_of.get(layer)) for layer in range(definition.num_layers)
        ),
        final_norm=reader.read(names.final_norm, (definition.hidden_size,)),
        head=head.t(),
    )


class _Reader:
    """Reads tensors of known shapes in the wanted format."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        definition: DecoderDefinition,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.definition = definition
        self.dtype = dtype
        self.device = device

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: int | slice | None = None
    ) -> torch.Tensor:
        tensor = self.checkpoint.read(name, rows)
        if tuple(tensor.shape) != shape:
            msg = (
                f"{self.checkpoint.folder}: {name!r} has shape {tuple(tensor.shape)}, "
                f"config.json makes it {shape}"
            )
            raise CheckpointError(msg)
        return tensor.to(device=self.device, dtype=self.dtype)

    def layer(self, layer: int, experts: Sequence[int] | None) -> LayerWeights:
        """Layer `layer`; with these experts, or dense if None."""
        definition, names = self.definition, self.definition.weights
        prefix = names.layer.format(layer=layer)
        hidden = definition.hidden_size
        is_dense = experts is None
        router = (definition.num_experts, hidden)
        qkv, qkv_bias = self._qkv(prefix + names.attention)
        output, output_bias = self._output(prefix + names.attention)
        return LayerWeights(
            input_norm=self.read(prefix + names.input_norm, (hidden,)),
            post_norm=self.read(prefix + names.post_norm, (hidden,)),
            qkv=qkv,
            qkv_bias=qkv_bias,
            qk_norm=self._qk_norm(prefix + names.attention),
            output=output,
            output_bias=output_bias,
            router=None if is_dense else self.read(prefix + names.router, router).t().contiguous(),
            experts=None if experts is None else self._experts(prefix + names.experts, experts),
            dense=self._dense(prefix + names.dense) if is_dense else None,
        )

    def _qkv(self, prefix: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The three projections side by side, and their biases."""
        definition = self.definition
        queries = definition.num_heads * definition.head_dim
        keys = definition.num_kv_heads * definition.head_dim
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        weights = [
            self.read(f"{prefix}{name}.weight", (width, definition.hidden_size))
            for name, width in widths.items()
        ]
        qkv = torch.cat(weights).t().contiguous()
        if not definition.attention_bias:
            return qkv, None
        biases = [self.read(f"{prefix}{name}.bias", (width,)) for name, width in widths.items()]
        return qkv, torch.cat(biases)

    def _output(self, prefix: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        definition = self.definition
        queries = definition.num_heads * definition.head_dim
        weight = self.read(f"{prefix}o_proj.weight", (definition.hidden_size, queries))
        weight = weight.t().contiguous()
        if not definition.attention_bias:
            return weight, None
        return weight, self.read(f"{prefix}o_proj.bias", (definition.hidden_size,))

    def _qk_norm(self, prefix: str) -> torch.Tensor | None:
        definition, size = self.definition, self.definition.head_dim
        if definition.qk_norm == "none":
            return None
        parts = []
        for name, heads in (("q", definition.num_heads), ("k", definition.num_kv_heads)):
            width = size if definition.qk_norm == "head" else heads * size
            weight = self.read(f"{prefix}{name}_norm.weight", (width,))
            parts.append(weight.view(-1, size).expand(heads, size))
        return torch.cat(parts)

    def _dense(self, prefix: str) -> ExpertWeights:
        gate_up, down = self._separate(prefix, self.definition.dense_size)
        return ExpertWeights(
            gate_up=gate_up.t().contiguous()[None], down=down.t().contiguous()[None]
        )

    def _experts(self, prefix: str, experts: Sequence[int]) -> ExpertWeights:
        hidden, size = self.definition.hidden_size, self.definition.expert_size
        gate_up = torch.empty(
            (len(experts), 2 * size, hidden), dtype=self.dtype, device=self.device
        )
        down = torch.empty((len(experts), size, hidden), dtype=self.dtype, device=self.device)
        is_fused = prefix + "gate_up_proj" in self.checkpoint
        for slot, expert in enumerate(experts):
            if is_fused:
                gate_up[slot] = self.read(prefix + "gate_up_proj", (2 * size, hidden), rows=expert)
                down[slot] = self.read(prefix + "down_proj", (hidden, size), rows=expert).t()
            else:
                gate_up[slot], down_DF = self._separate(f"{prefix}{expert}.", size)
                down[slot] = down_DF.t()
        joined = None
        if can_join(size, hidden, self.dtype):
            joined = gate_up.view(-1, 2, size, hidden).permute(3, 1, 0, 2).flatten(1)
        return ExpertWeights(gate_up=gate_up.transpose(1, 2), down=down, joined=joined)

    def _separate(self, prefix: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate above up (2F, D), and down (D, F), of three linear layers."""
        names, hidden = self.definition.weights, self.definition.hidden_size
        gate, up = (
            self.read(f"{prefix}{name}.weight", (size, hidden)) for name in (names.gate, names.up)
        )
        return torch.cat([gate, up]), self.read(f"{prefix}{names.down}.weight", (hidden, size))
