"""Hugging Face router logits, saved layer by layer in a safetensors file.

Tensors are named by their layer's index, `3` or `router_logits.3`: (tokens, experts) or (sequences,
tokens, experts), before softmax or sigmoid. `sequence_ids` (tokens,) may tell texts apart. A router
with a selection bias (DeepSeek-V3) needs `e_score_correction_bias.3` (experts,) too, or its choice
cannot be repeated.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.interop.arrays import load_tensors, whole_numbers
from placement.interop.errors import RecordError
from placement.merging import merge_traces
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from placement.interop.model_shape import ModelShape
    from placement.interop.trace_parts import Phase

LOGITS = re.compile(r"(?:router_logits\.)?([0-9]{1,9})$")
BIAS = "e_score_correction_bias."


def read(paths: Sequence[Path], shape: ModelShape, *, phase: Phase = "all") -> RoutingTrace:
    """A trace of files of router logits.

    Raises:
        RecordError: naming the file.
    """
    if phase != "all":
        msg = f"router logits do not tell prefill from decode; drop --phase {phase}"
        raise RecordError(msg)
    traces = [_read_one(path, shape) for path in paths]
    return merge_traces(traces) if len(traces) > 1 else traces[0]


def _read_one(path: Path, shape: ModelShape) -> RoutingTrace:
    tensors = load_tensors(path)
    logits = {int(m[1]): tensors[name] for name in tensors if (m := LOGITS.match(name))}
    layer_ids = tuple(sorted(logits))
    if not layer_ids or (shape.moe_layers is not None and layer_ids != shape.moe_layers):
        msg = f"{path}: logits of layers {layer_ids}, the model has experts at {shape.moe_layers}"
        raise RecordError(msg)
    first = logits[layer_ids[0]]
    if first.ndim not in {2, 3} or not first.size:
        msg = f"{path}: logits have shape {first.shape}, expected (tokens, experts)"
        raise RecordError(msg)
    shape = shape.filled(num_experts=first.shape[-1])
    sequences = _sequences(path, tensors, first)
    columns = []
    for layer in layer_ids:
        if logits[layer].shape != first.shape or not np.isfinite(logits[layer]).all():
            msg = f"{path}: layer {layer} has logits of {logits[layer].shape}, or NaN; layer "
            raise RecordError(msg + f"{layer_ids[0]} of {first.shape}")
        bias = tensors.get(f"{BIAS}{layer}")
        if bias is not None and bias.shape != first.shape[-1:]:
            msg = f"{path}: the bias of layer {layer} has shape {bias.shape}, not one an expert"
            raise RecordError(msg)
        flat = logits[layer].reshape(-1, first.shape[-1]).astype(np.float32)
        columns.append(choose_experts(flat, shape, bias))
    return RoutingTrace(
        expert_ids=np.stack([ids for ids, _ in columns], axis=1),
        expert_weights=np.stack([weights for _, weights in columns], axis=1),
        sequence_ids=sequences,
        num_experts=first.shape[-1],
        model=shape.model or "unknown",
        layer_ids=layer_ids,
        phase="teacher-forced",
        source=f"router logits of {path.name}",
    )


def _sequences(path: Path, tensors: dict[str, Any], first: NDArray[Any]) -> NDArray[np.int32]:
    tokens = int(np.prod(first.shape[:-1]))
    if "sequence_ids" in tensors:
        what = f"{path}: sequence_ids"
        sequences = whole_numbers(tensors["sequence_ids"], what, stop=1 << 31).astype(np.int32)
        if sequences.shape != (tokens,):
            msg = f"{path}: sequence_ids has shape {sequences.shape}, the logits {tokens} tokens"
            raise RecordError(msg)
        return sequences
    if first.ndim == 3:
        return np.repeat(np.arange(first.shape[0], dtype=np.int32), first.shape[1])
    return np.zeros(tokens, dtype=np.int32)


def choose_experts(
    logits: NDArray[np.float32], shape: ModelShape, bias: NDArray[Any] | None = None
) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
    """The experts a router picks, by falling weight, and their weights.

    Group-limited routers keep the `top_groups` best of `num_groups` groups first: by the best score
    of a group (DeepSeek-V2) or the sum of its two best, with the selection bias (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2).

    Args:
        logits: (tokens, experts).
        shape: `top_k`, groups and scoring of the model.
        bias: (experts,) added for the choice, not for the weight.

    Returns:
        int16 and float16 (tokens, top_k). Weights are not normalised.
    """
    if shape.scoring == "sigmoid" and bias is None:
        msg = "this router adds a selection bias to its scores; save e_score_correction_bias.LAYER"
        raise RecordError(msg)
    scores = _scores(logits, shape.scoring)
    choice = scores if bias is None else scores + bias.astype(np.float32)
    if shape.num_groups > 1:
        choice = np.where(_kept_groups(choice, shape), choice, -np.inf)
    picked = np.argsort(-choice, axis=1, kind="stable")[:, : shape.need_top_k()]
    weights = np.take_along_axis(scores, picked, axis=1)
    order = np.argsort(-weights, axis=1, kind="stable")
    ids = np.take_along_axis(picked, order, axis=1).astype(np.int16)
    return ids, np.take_along_axis(weights, order, axis=1).astype(np.float16)


def _scores(logits: NDArray[np.float32], scoring: str) -> NDArray[np.float32]:
    if scoring == "sigmoid":
        return np.asarray(1.0 / (1.0 + np.exp(-logits)), dtype=np.float32)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float32)


def _kept_groups(choice: NDArray[np.float32], shape: ModelShape) -> NDArray[np.bool_]:
    """(tokens, experts) whether an expert's group is among the best."""
    grouped = choice.reshape(len(choice), shape.num_groups, -1)
    best = np.sort(grouped, axis=2)[:, :, -2 if shape.group_score == "top2" else -1 :].sum(axis=2)
    kept = np.argsort(-best, axis=1, kind="stable")[:, : shape.top_groups]
    mask = np.zeros((len(choice), shape.num_groups), dtype=np.bool_)
    np.put_along_axis(mask, kept, values=True, axis=1)
    return np.repeat(mask, grouped.shape[2], axis=1)
