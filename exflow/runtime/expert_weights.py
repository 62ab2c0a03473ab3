"""The weights of experts, laid out for `rows @ weight`, and how they are read.

Shape suffixes: D hidden size, S slots (physical experts) of the rank, F width of an expert, I its
inner width: 2F with a gate, else F.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from exflow.models.mxfp4 import dequantize
from exflow.models.parts import Activation
from exflow.runtime.experts import can_join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.runtime.cpu_kernels import Floats
    from exflow.runtime.tensor_reader import TensorReader


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """The physical experts of a rank at one layer; or a dense block, as one expert.

    Attributes:
        gate_up: (S, D, I), the gate's columns first.
        down: (S, F, D), contiguous.
        activation: between the two.
        gate_up_bias: (S, I).
        down_bias: (S, D).
        joined: (D, SI) the gates of all slots, then their ups, if the experts are small.
        joined_bias: (SI) alike.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: Activation = field(default_factory=Activation)
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    joined: torch.Tensor | None = None
    joined_bias: torch.Tensor | None = None

    @cached_property
    def arrays(self) -> tuple[Floats, Floats]:
        """(S, I, D) gates and ups, and (S, F, D) downs, for kernels."""
        return np.ascontiguousarray(self.gate_up.transpose(1, 2).numpy()), self.down.numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Expert:
    """One expert: gate above up (I, D), down (D, F), and their biases."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


def read_dense(reader: TensorReader, prefix: str, size: int) -> ExpertWeights:
    """The block below `prefix`, as one expert."""
    expert = _read_separate(reader, prefix, size)
    biases = (expert.gate_up_bias, expert.down_bias)
    gate_up_bias, down_bias = (None if bias is None else bias[None] for bias in biases)
    return ExpertWeights(
        gate_up=expert.gate_up.t().contiguous()[None],
        down=expert.down.t().contiguous()[None],
        activation=reader.definition.activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )


def read_experts(reader: TensorReader, prefix: str, experts: Sequence[int]) -> ExpertWeights:
    """These experts of those below `prefix`, and no others."""
    definition = reader.definition
    hidden, size, activation = definition.hidden_size, definition.expert_size, definition.activation
    inner, count = activation.num_inner * size, len(experts)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty((count, *shape), dtype=reader.dtype, device=reader.device)

    gate_up, down = empty(inner, hidden), empty(size, hidden)
    gate_up_bias = empty(inner) if activation.has_bias else None
    down_bias = empty(hidden) if activation.has_bias else None
    for slot, number in enumerate(experts):
        expert = _read_expert(reader, prefix, number)
        gate_up[slot], down[slot] = expert.gate_up, expert.down.t()
        if gate_up_bias is not None and expert.gate_up_bias is not None:
            gate_up_bias[slot] = expert.gate_up_bias
        if down_bias is not None and expert.down_bias is not None:
            down_bias[slot] = expert.down_bias
    joined = joined_bias = None
    if can_join(size, hidden, reader.dtype):
        parts = gate_up.view(count, activation.num_inner, size, hidden)
        joined = parts.permute(3, 1, 0, 2).flatten(1)
        if gate_up_bias is not None:
            joined_bias = (
                gate_up_bias.view(count, activation.num_inner, size).transpose(0, 1).flatten()
            )
    return ExpertWeights(
        gate_up=gate_up.transpose(1, 2),
        down=down,
        activation=activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        joined=joined,
        joined_bias=joined_bias,
    )


def _read_expert(reader: TensorReader, prefix: str, expert: int) -> _Expert:
    """An expert, in whichever of three ways the checkpoint has it."""
    if not (reader.has(f"{prefix}gate_up_proj") or reader.has(f"{prefix}gate_up_proj_blocks")):
        return _read_separate(reader, f"{prefix}{expert}.", reader.definition.expert_size)
    definition = reader.definition
    hidden, size = definition.hidden_size, definition.expert_size
    gate_up = _read_fused(reader, f"{prefix}gate_up_proj", expert, (2 * size, hidden))
    down = _read_fused(reader, f"{prefix}down_proj", expert, (hidden, size))
    gate_up_bias = down_bias = None
    if definition.activation.has_bias:
        gate_up_bias = reader.read(f"{prefix}gate_up_proj_bias", (2 * size,), rows=expert)
        down_bias = reader.read(f"{prefix}down_proj_bias", (hidden,), rows=expert)
    if definition.weights.fused_is_transposed:  # gate and up alternate
        gate_up = torch.cat([gate_up[::2], gate_up[1::2]])
        if gate_up_bias is not None:
            gate_up_bias = torch.cat([gate_up_bias[::2], gate_up_bias[1::2]])
    return _Expert(gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias)


def _read_fused(
    reader: TensorReader, name: str, expert: int, shape: tuple[int, int]
) -> torch.Tensor:
    """(out, in) one expert's row of a fused tensor."""
    size_out, size_in = shape
    if reader.has(f"{name}_blocks"):
        groups = size_in // 32
        blocks = reader.raw(f"{name}_blocks", (size_out, groups, 16), rows=expert)
        scales = reader.raw(f"{name}_scales", (size_out, groups), rows=expert)
        return dequantize(blocks, scales).to(device=reader.device, dtype=reader.dtype)
    if reader.definition.weights.fused_is_transposed:
        return reader.read(name, (size_in, size_out), rows=expert).t()
    return reader.read(name, shape, rows=expert)


def _read_separate(reader: TensorReader, prefix: str, size: int) -> _Expert:
    """Linear layers of one block: gate, up and down, or up and down."""
    definition = reader.definition
    names, hidden, activation = definition.weights, definition.hidden_size, definition.activation
    first = (names.gate, names.up)[-activation.num_inner :]
    weights = [reader.linear(prefix + name, size, hidden) for name in first]
    biases = [reader.bias(prefix + name, size, is_there=activation.has_bias) for name in first]
    there = [bias for bias in biases if bias is not None]
    return _Expert(
        gate_up=torch.cat(weights),
        down=reader.linear(prefix + names.down, hidden, size),
        gate_up_bias=torch.cat(there) if there else None,
        down_bias=reader.bias(prefix + names.down, hidden, is_there=activation.has_bias),
    )
