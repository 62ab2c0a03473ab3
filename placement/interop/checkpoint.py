"""A plan as a permuted checkpoint: any engine that splits experts contiguously then follows it.

Expert rows and router rows are reordered alike, layer by layer, so the model computes the same: the
expert at position p of a layer is the logical expert in slot p of the plan. It needs no replicas
and equal slots. A group-limited router reads groups off positions, so a plan must keep each group
together; within a rank the order is chosen to do so.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from placement.interop.errors import ExportError
from placement.interop.safetensors_rows import Change, Tensor, read_header, rewrite
from placement.interop.slots import ReadPlan, check_rows, from_rows
from placement.interop.targets import (
    Finding,
    check_equal_slots,
    check_no_replicas,
    check_shape,
    error,
)
from placement.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan

INDEX = "model.safetensors.index.json"
NOTE = "exflow_placement.json"
FORMAT = "exflow.permuted-checkpoint/1"
LAYER = re.compile(r"^(?P<before>.*?\blayers\.)(?P<layer>\d+)\.(?P<rest>.*)$")
EXPERT = re.compile(r"^(?P<before>.*\bexperts\.)(?P<expert>\d+)(?P<after>\..*)$")
FUSED = re.compile(r"(?:^|\.)experts\.(?!\d)[\w.]+$")
ROUTER = re.compile(r"^(?:mlp|block_sparse_moe|feed_forward|moe|ffn)\.(?:gate|router)\.[\w.]+$")


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """The logical expert at each position, by the model's layer index."""

    num_experts: int
    experts: dict[int, list[int]]

    def change(self, name: str, tensor: Tensor) -> Change | None:
        """What becomes of a tensor of the checkpoint; None if nothing.

        Raises:
            ExportError: for a tensor of experts or router in an unknown form.
        """
        match = LAYER.match(name)
        if match is None or int(match["layer"]) not in self.experts:
            return None
        order, rest = self.experts[int(match["layer"])], match["rest"]
        if "shared_expert" in rest:
            return None
        if one := EXPERT.match(rest):
            position = order.index(int(one["expert"]))
            head = f"{match['before']}{match['layer']}.{one['before']}"
            return Change(name=f"{head}{position}{one['after']}")
        if FUSED.search(rest) or ROUTER.match(rest):
            if not tensor.shape or tensor.shape[0] != self.num_experts:
                msg = (
                    f"{name} has shape {list(tensor.shape)}; expected its first dimension to be the "
                    f"{self.num_experts} experts. This checkpoint's layout is not supported"
                )
                raise ExportError(msg)
            return Change(name=name, rows=order)
        return None


def check(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """No replicas, equal slots, groups kept together."""
    why = "an engine without placement holds each expert once"
    findings = [*check_shape(plan, shape), *check_no_replicas(plan, why), *check_equal_slots(plan)]
    if findings:
        return findings
    if shape.num_groups > 1 and (layer := _torn_layer(plan, shape)) is not None:
        findings.append(
            error(
                f"the router chooses {shape.top_groups} of {shape.num_groups} groups of experts by "
                f"position, and layer {layer} would tear a group apart; use a target that maps "
                f"logical experts (sglang, vllm, trtllm)"
            )
        )
    return findings


def _torn_layer(plan: PlacementPlan, shape: ModelShape) -> int | None:
    size = plan.num_experts // shape.num_groups
    for layer, order in permutation_of(plan, shape).experts.items():
        for start in range(0, plan.num_experts, size):
            if len({expert // size for expert in order[start : start + size]}) > 1:
                return layer
    return None


def permutation_of(plan: PlacementPlan, shape: ModelShape) -> Permutation:
    """Positions of the experts; inside a rank by group, then by number."""
    size = plan.num_experts // shape.num_groups
    orders = {
        layer: [e for experts in ranks for e in sorted(experts, key=lambda e: (e // size, e))]
        for layer, ranks in zip(plan.layer_ids, plan.slots, strict=True)
    }
    return Permutation(num_experts=plan.num_experts, experts=orders)


def export(
    plan: PlacementPlan,
    shape: ModelShape,
    source: Path,
    target: Path,
    *,
    on_file: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a permuted copy of the checkpoint in folder `source` to the new folder `target`.

    Args:
        plan: without replicas, equal slots.
        shape: of the checkpoint's config.json.
        source: folder with safetensors files.
        target: a folder that does not exist or is empty.
        on_file: called with the name of each file before it is written.

    Raises:
        ExportError: if the plan or the checkpoint does not allow it; nothing is written then.
    """
    reasons = [finding.text for finding in check(plan, shape) if finding.level == "error"]
    if reasons:
        msg = "checkpoint cannot take this plan: " + "; ".join(reasons)
        raise ExportError(msg)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        msg = f"{source}: no .safetensors files; a checkpoint folder was expected"
        raise ExportError(msg)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        msg = f"{target} exists and is a file or not empty; name a new folder"
        raise ExportError(msg)
    permutation = permutation_of(plan, shape)
    changes = {shard: _changes(shard, permutation) for shard in shards}
    _check_complete(plan, [name for of_shard in changes.values() for name in of_shard])
    target.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        on_file(shard.name)
        rewrite(shard, target / shard.name, changes[shard])
    _copy_others(source, target, on_file)
    _write_index(source, target, [c for of_shard in changes.values() for c in of_shard.items()])
    _write_note(plan, permutation, target)


def _changes(shard: Path, permutation: Permutation) -> dict[str, Change]:
    tensors, _, _ = read_header(shard)
    found = ((name, permutation.change(name, tensor)) for name, tensor in tensors.items())
    return {name: change for name, change in found if change is not None}


def _check_complete(plan: PlacementPlan, changed: list[str]) -> None:
    """Every MoE layer must have had both experts and a router, or the copy would compute nonsense."""
    rests = {layer: list[str]() for layer in plan.layer_ids}
    for name in changed:
        match = LAYER.match(name)
        assert match is not None
        rests[int(match["layer"])].append(match["rest"])
    for layer, names in rests.items():
        has_router = any(ROUTER.match(rest) for rest in names)
        has_experts = any(EXPERT.match(rest) or FUSED.search(rest) for rest in names)
        if not has_router or not has_experts:
            what = "experts" if has_router else "router"
            msg = f"layer {layer}: no {what} found in the checkpoint; its names are not known"
            raise ExportError(msg)


def _copy_others(source: Path, target: Path, on_file: Callable[[str], None]) -> None:
    for file in sorted(source.iterdir()):
        weights = file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
        if file.is_file() and not weights and file.name not in {INDEX, NOTE}:
            on_file(file.name)
            shutil.copyfile(file, target / file.name)


def _write_index(source: Path, target: Path, changes: list[tuple[str, Change]]) -> None:
    index_file = source / INDEX
    if not index_file.is_file():
        return
    renamed = {name: change.name for name, change in changes}
    try:
        index: dict[str, Any] = parse_json(index_file.read_text(encoding="utf-8"))
        weight_map = {renamed.get(name, name): file for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        msg = f"{index_file}: not the index of a checkpoint: {failure!r}"
        raise ExportError(msg) from failure
    index["weight_map"] = dict(sorted(weight_map.items()))
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_note(plan: PlacementPlan, permutation: Permutation, target: Path) -> None:
    note = {
        "format": FORMAT,
        "model": plan.model,
        "num_experts": plan.num_experts,
        "num_ranks": plan.num_ranks,
        "expert_of_position": {str(layer): row for layer, row in permutation.experts.items()},
    }
    (target / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")


def read_plan(folder: Path, num_ranks: int) -> ReadPlan:
    """The slots of a permuted checkpoint, from the note in its folder.

    Raises:
        ExportError: if the folder has no usable note.
    """
    file = folder / NOTE
    try:
        note = parse_json(file.read_text(encoding="utf-8"))
        rows = {int(layer): row for layer, row in note["expert_of_position"].items()}
        experts, model = int(note["num_experts"]), str(note["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as failure:
        msg = f"{file}: not the note of a permuted checkpoint: {failure!r}"
        raise ExportError(msg) from failure
    layer_ids = tuple(sorted(rows))
    slots = from_rows(check_rows([rows[layer] for layer in layer_ids]), num_ranks)
    return ReadPlan(layer_ids=layer_ids, num_experts=experts, slots=slots, model=model)
