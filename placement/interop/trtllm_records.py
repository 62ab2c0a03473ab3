"""TensorRT-LLM: the folder of `EXPERT_STATISTIC_PATH`, or the routing of single requests (.npy).

* `meta_info.json`: `num_experts`, `num_experts_per_token`.
* `rank{r}_raw.safetensors`: `"{iteration}_{layer}"` -> (tokens, top_k) logical experts.
* `rank{r}.safetensors`: `"{iteration}_{layer}"` -> (experts,) counts: loads only.
* .npy: `CompletionOutput.routed_experts` of a request, (tokens - 1, MoE layers, top_k).

The folder names no requests: an iteration of a rank counts as one sequence.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.interop.arrays import load_npy, load_tensors
from placement.interop.counts import trace_of_counts
from placement.interop.errors import ConfigError, RecordError
from placement.interop.trace_parts import Request, TraceParts
from placement.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from placement.interop.model_shape import ModelShape
    from placement.interop.trace_parts import Phase
    from placement.trace import RoutingTrace

    Statistic = dict[tuple[int, int], NDArray[Any]]

KEY = re.compile(r"([0-9]{1,18})_([0-9]{1,9})$")
RANK = re.compile(r"rank(\d+)(_raw)?\.safetensors$")


def read(paths: Sequence[Path], shape: ModelShape, *, phase: Phase = "all") -> RoutingTrace:
    """A trace of one statistics folder or of .npy files.

    Raises:
        RecordError: naming the file.
    """
    if all(path.suffix == ".npy" for path in paths):
        parts = TraceParts(shape=shape, phase=phase, source="TensorRT-LLM routed_experts")
        for path in paths:
            parts.add(Request(name=str(path), expert_ids=load_npy(path)))
        return parts.build()
    if len(paths) != 1 or not paths[0].is_dir():
        msg = f"{paths[0]}: expected one statistics folder (EXPERT_STATISTIC_PATH) or .npy files"
        raise RecordError(msg)
    if phase != "all":
        msg = f"a statistics folder does not tell prefill from decode; drop --phase {phase}"
        raise RecordError(msg)
    return _read_folder(paths[0], shape)


def _read_folder(folder: Path, shape: ModelShape) -> RoutingTrace:
    shape = _with_meta(folder, shape)
    raw, counts = _files(folder, raw=True), _files(folder, raw=False)
    if raw:
        return _read_raw(raw, counts, shape)
    if not counts:
        msg = f"{folder}: no rank*.safetensors; was EXPERT_STATISTIC_ITER_RANGE reached?"
        raise RecordError(msg)
    loads = [_load_counts(file, shape.need_experts()) for file in counts.values()]
    layers = sorted({layer for load in loads for _, layer in load})
    if not layers:
        msg = f"{folder}: its statistics files are empty"
        raise RecordError(msg)
    total = np.zeros((len(layers), shape.need_experts()))
    for load in loads:
        for (_, layer), count in load.items():
            total[layers.index(layer)] += count
    shape = shape.filled(moe_layers=tuple(layers))
    return trace_of_counts(total, shape, source="TensorRT-LLM expert statistic")


def _with_meta(folder: Path, shape: ModelShape) -> ModelShape:
    file = folder / "meta_info.json"
    try:
        meta = parse_json(file.read_text(encoding="utf-8"))
        experts, top_k = int(meta["num_experts"]), int(meta["num_experts_per_token"])
        return shape.filled(num_experts=experts, top_k=top_k)
    except ConfigError as error:
        msg = f"{file}: {error}"
        raise RecordError(msg) from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        msg = f"{file}: not a TensorRT-LLM meta_info.json: {error!r}"
        raise RecordError(msg) from error


def _files(folder: Path, *, raw: bool) -> dict[int, Path]:
    """Statistics files by rank."""
    matches = ((file, RANK.match(file.name)) for file in folder.iterdir())
    found = {int(m[1]): file for file, m in matches if m and bool(m[2]) == raw}
    return dict(sorted(found.items()))


def _load(path: Path) -> Statistic:
    tensors = load_tensors(path)
    keys = {name: KEY.match(name) for name in tensors}
    unknown = [name for name, match in keys.items() if match is None]
    if unknown:
        msg = f"{path}: tensor {unknown[0]!r} is not named iteration_layer"
        raise RecordError(msg)
    return {(int(m[1]), int(m[2])): tensors[name] for name, m in keys.items() if m}


def _load_counts(path: Path, num_experts: int) -> Statistic:
    counts = _load(path)
    for (iteration, layer), count in counts.items():
        if count.shape != (num_experts,) or not np.isfinite(count).all():
            msg = f"{path}: tensor {iteration}_{layer} must count each of {num_experts} experts"
            raise RecordError(msg)
    return counts


def _read_raw(raw: dict[int, Path], counts: dict[int, Path], shape: ModelShape) -> RoutingTrace:
    parts: TraceParts | None = None
    for rank, file in raw.items():
        chosen = _load(file)
        counted = _load_counts(counts[rank], shape.need_experts()) if rank in counts else {}
        layers = _layers(chosen)
        if not layers:
            msg = f"{file}: holds no routed experts"
            raise RecordError(msg)
        try:
            shape = shape.filled(moe_layers=layers)
        except ConfigError as error:
            is_split = len({_layers(_load(other)) for other in raw.values()}) > 1
            why = "; each rank recorded other layers, run without pipeline parallelism"
            msg = f"{file}: {error}{why if is_split else ''}"
            raise RecordError(msg) from error
        if parts is None:
            parts = TraceParts(shape=shape, source="TensorRT-LLM expert statistic")
        for iteration in sorted({iteration for iteration, _ in chosen}):
            name = f"{file}, iteration {iteration}"
            _check_complete(name, iteration, chosen, counted)
            parts.add(_request(name, [chosen.get((iteration, layer)) for layer in layers]))
    assert parts is not None
    return parts.build()


def _layers(chosen: Statistic) -> tuple[int, ...]:
    return tuple(sorted({layer for _, layer in chosen}))


def _request(name: str, layers: list[NDArray[Any] | None]) -> Request:
    shapes = {None if layer is None else layer.shape for layer in layers}
    if len(shapes) != 1:
        msg = f"{name}: the layers have different tokens {shapes}; one pass routed them in pieces"
        raise RecordError(msg)
    return Request(
        name=name, expert_ids=np.stack([layer for layer in layers if layer is not None], axis=1)
    )


def _check_complete(name: str, iteration: int, chosen: Statistic, counted: Statistic) -> None:
    """A later piece of a pass replaces the raw record of an earlier one, but adds to the counts."""
    for (at, layer), count in counted.items():
        recorded = chosen[at, layer].size if (at, layer) in chosen else 0
        if at == iteration and int(count.sum()) != recorded:
            msg = (
                f"{name}, layer {layer}: {int(count.sum())} expert choices were counted, "
                f"{recorded} recorded; record with a larger moe max_num_tokens, so "
                f"that a pass is not cut in pieces"
            )
            raise RecordError(msg)
