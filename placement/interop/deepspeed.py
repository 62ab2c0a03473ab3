"""DeepSpeed AutoEP (0.19.8): the expert placement descriptor of each layer.

Checkpoints carry it; DeepSpeed lowers it to an affine map when it reshards a checkpoint. Its own
runtime still routes to contiguous ranks: to run a plan, permute the checkpoint (`checkpoint.py`).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from placement.interop.errors import ExportError
from placement.interop.slots import ReadPlan, from_ranks
from placement.interop.targets import Finding, Target, check_shape, load_object, warning

if TYPE_CHECKING:
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan

VERSION = 1
ROOT = "expert_placement"
LAYER = re.compile(r"[0-9]{1,9}$")


def check(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """Replicas and unequal ranks can be written; the runtime does not act on them."""
    note = (
        "DeepSpeed 0.19.8 uses the descriptor to reshard checkpoints; its dispatch still assumes "
        "contiguous experts: export --target checkpoint to serve this plan"
    )
    return [*check_shape(plan, shape), warning(note)]


def render(plan: PlacementPlan, shape: ModelShape) -> str:
    """A descriptor a layer, under the model's layer index."""
    del shape
    lines = ",\n".join(
        f'"{layer}": {json.dumps(descriptor(plan, ordinal))}'
        for ordinal, layer in enumerate(plan.layer_ids)
    )
    return f'{{"{ROOT}": {{\n{lines}\n}}}}\n'


def descriptor(plan: PlacementPlan, ordinal: int) -> dict[str, Any]:
    """DeepSpeed's descriptor of the plan's layer number `ordinal`."""
    return {
        "version": VERSION,
        "num_experts": plan.num_experts,
        "ep_size": plan.num_ranks,
        "ranks": [
            {"rank": rank, "experts": list(experts)}
            for rank, experts in enumerate(plan.slots[ordinal])
        ],
    }


def parse(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of descriptors.

    Raises:
        ExportError: if they are of another version or number of ranks.
    """
    del shape
    found = load_object(text, "file of DeepSpeed descriptors").get(ROOT)
    if not isinstance(found, dict) or not found or not all(LAYER.match(layer) for layer in found):
        msg = (
            f"not a file of DeepSpeed descriptors: {ROOT!r} must hold one under each layer's index"
        )
        raise ExportError(msg)
    layers = {int(layer): found[layer] for layer in sorted(found, key=int)}
    slots = tuple(_ranks(entry, layer, num_ranks) for layer, entry in layers.items())
    num_experts, *others = [entry.get("num_experts") for entry in layers.values()]
    if type(num_experts) is not int or any(other != num_experts for other in others):
        msg = "the descriptors must agree on num_experts, a whole number"
        raise ExportError(msg)
    return ReadPlan(layer_ids=tuple(layers), num_experts=num_experts, slots=slots)


def _ranks(entry: Any, layer: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    entry = entry if isinstance(entry, dict) else {}
    version, ranks = entry.get("version"), entry.get("ep_size")
    if version != VERSION or ranks != num_ranks:
        msg = (
            f"layer {layer}: descriptor of version {version} for {ranks} ranks, expected "
            f"version {VERSION} for {num_ranks}"
        )
        raise ExportError(msg)
    where = f"layer {layer}"
    return from_ranks(entry.get("ranks"), num_ranks, rank="rank", experts="experts", where=where)


def usage(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """What the file is for."""
    del plan, shape
    return [
        f"{path} holds an `expert_placement` descriptor a layer for DeepSpeed's universal "
        "checkpoint tools",
        "to serve the plan with AutoEP: exflow export --target checkpoint",
    ]


TARGET = Target(
    name="deepspeed", suffix=".json", check=check, render=render, parse=parse, usage=usage
)
