"""The same loss and gradients as `model.forward_backward`, through C++ kernels on one CPU core.

`kernels.cpp` is built with the machine's C++ compiler when it is first used and called through ctypes.
Nothing is differentiated automatically; what the backward pass needs is kept layer by layer.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reference_model.model import ATTENTION, Batch, ModelShape, rope_tables

FLAGS = ("-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-std=c++17")
QUERIES = 32  # sequences are a multiple of this, see kernels.cpp


def is_available() -> bool:
    """Whether this machine has AVX-512 and a C++ compiler."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and shutil.which("g++") is not None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; built once for each version of the source."""
    source = Path(__file__).with_name("kernels.cpp")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"exflow-kernels-{os.getuid()}-{digest}.so"
    if not target.exists():
        building = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run(["g++", *FLAGS, str(source), "-o", str(building)], check=True)
        building.replace(target)
    return ctypes.CDLL(str(target))


def call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a kernel with contiguous tensors (as pointers), integers and floats."""
    converted: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous(), name
            assert argument.dtype in (torch.float32, torch.int64), name
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(ctypes.c_long(argument))
    getattr(library(), name)(*converted)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the backward pass of a layer needs again."""

    hidden_TD: Tensor
    qkv: Tensor
    mixed: Tensor
    out_TD: Tensor
    normed_TD: Tensor
    probs_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    pre_activations: Tensor


def forward_backward(
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    batch: Batch,
    shape: ModelShape,
    *,
    backward: bool = True,
) -> tuple[float, Tensor]:
    """See `model.forward_backward`; with `backward=False` only `embed` and `final_norm` get gradients."""
    tokens_T = batch.tokens_BS.reshape(-1).contiguous()
    targets_T = batch.targets_BS.reshape(-1).contiguous()
    tables = rope_tables(shape, batch.tokens_BS.shape[1])
    sizes = _sizes(shape, *batch.tokens_BS.shape)
    hidden, layers = params["embed"][tokens_T], []
    for i in range(shape.num_layers):
        hidden, layer = _forward(i, hidden, params, tables, shape, sizes)
        layers.append(layer)
    loss, grad = hidden.new_empty(1), torch.empty_like(hidden)
    scale = batch.scale / len(tokens_T)
    call("head", hidden, params["final_norm"], params["embed"], targets_T, loss, grad,
         grads["final_norm"], grads["embed"], *hidden.shape, shape.vocab_size, scale, shape.norm_eps)  # fmt: skip
    if backward:
        for i in reversed(range(shape.num_layers)):
            push_E = batch.load_LE[i] * (batch.balance * scale * shape.num_experts)
            grad = _backward(i, layers[i], grad, push_E, params, grads, tables, shape, sizes)
        grads["embed"].index_add_(0, tokens_T, grad)
    counts = [torch.bincount(x.ids_TK.flatten(), minlength=shape.num_experts) for x in layers]
    return loss.item() / len(tokens_T), torch.stack(counts)


def _sizes(shape: ModelShape, sequences: int, length: int) -> tuple[int, ...]:
    widths = (shape.hidden_size, shape.head_width, shape.num_experts, shape.expert_width)
    if any(width % 16 for width in widths) or length % QUERIES or shape.vocab_size % 64:
        message = (
            f"the kernels need widths that are multiples of 16 and sequences of a multiple of "
            f"{QUERIES}, got {shape} and {length}; choose --engine torch"
        )
        raise ValueError(message)
    return (sequences, length, shape.hidden_size, shape.num_heads, shape.head_width,
            shape.num_experts, shape.top_k)  # fmt: skip


def _forward(i, hidden, params, tables, shape, sizes):  # noqa: ANN001, ANN202
    T, (_, _, D, N, H, E, K) = len(hidden), sizes
    layer = Layer(
        hidden_TD=hidden,
        qkv=hidden.new_empty(T, (N + 2) * H),
        mixed=hidden.new_empty(T, N * H),
        out_TD=torch.empty_like(hidden),
        normed_TD=torch.empty_like(hidden),
        probs_TE=hidden.new_empty(T, E),
        weights_TK=hidden.new_empty(T, K),
        ids_TK=torch.empty(T, K, dtype=torch.int64),
        pre_activations=hidden.new_empty(T * K, 2 * shape.expert_width),
    )
    following = torch.empty_like(hidden)
    call("attention_forward", hidden, *(params[f"{i}.{name}"] for name in ATTENTION), *tables,
         layer.qkv, layer.mixed, layer.out_TD, following, layer.normed_TD, layer.probs_TE,
         layer.weights_TK, layer.ids_TK, *sizes, shape.norm_eps)  # fmt: skip
    call("experts_forward", following, layer.normed_TD, layer.weights_TK, layer.ids_TK,
         params[f"{i}.gate_up"], params[f"{i}.down"], layer.pre_activations,
         T, K, E, D, shape.expert_width)  # fmt: skip
    return following, layer


def _backward(i, layer, grad, push_E, params, grads, tables, shape, sizes):  # noqa: ANN001, ANN202
    T, (_, _, D, _, _, E, K) = len(grad), sizes
    grad_normed, grad_weights = torch.zeros_like(grad), torch.empty_like(layer.weights_TK)
    call("experts_backward", grad, layer.normed_TD, layer.weights_TK, layer.ids_TK,
         layer.pre_activations, params[f"{i}.gate_up"], params[f"{i}.down"],
         grads[f"{i}.gate_up"], grads[f"{i}.down"], grad_normed, grad_weights,
         T, K, E, D, shape.expert_width)  # fmt: skip
    grad_hidden = torch.empty_like(grad)
    call("attention_backward", layer.hidden_TD, *(params[f"{i}.{name}"] for name in ATTENTION),
         *tables, layer.qkv, layer.mixed, layer.out_TD, layer.normed_TD, layer.probs_TE,
         layer.ids_TK, push_E, grad, grad_normed, grad_weights,
         *(grads[f"{i}.{name}"] for name in ATTENTION), grad_hidden, *sizes, shape.norm_eps)  # fmt: skip
    return grad_hidden
