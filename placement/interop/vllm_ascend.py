"""vLLM-Ascend (and MindIE): the file of `expert_map_path` in `--additional-config`.

Layers are numbered among the MoE layers. The reader makes one rectangular tensor a layer, so every
device needs the same number of experts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from placement.interop.errors import ExportError
from placement.interop.slots import ReadPlan, from_ranks
from placement.interop.targets import (
    Finding,
    Target,
    check_equal_slots,
    check_groups,
    check_shape,
    load_object,
    warning,
)

if TYPE_CHECKING:
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan


def check(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """Equal slots; several replicas are used by source rank, not by load."""
    findings = [*check_shape(plan, shape), *check_equal_slots(plan), *check_groups(plan, shape)]
    if plan.has_replicas:
        findings.append(
            warning(
                "a rank always uses replica (rank mod replicas) of an expert, near or far; "
                "the plan's traffic figures assume the nearest"
            )
        )
    return findings


def render(plan: PlacementPlan, shape: ModelShape) -> str:
    """Devices and their experts, layer by layer."""
    del shape
    layers = [
        {
            "layer_id": ordinal,
            "device_count": plan.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": list(experts)}
                for rank, experts in enumerate(ranks)
            ],
        }
        for ordinal, ranks in enumerate(plan.slots)
    ]
    lines = ",\n".join(json.dumps(layer) for layer in layers)
    return f'{{"moe_layer_count": {plan.num_layers}, "layer_list": [\n{lines}\n]}}\n'


def parse(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of an expert map.

    Raises:
        ExportError: if counts and lists disagree or a key is missing.
    """
    data = load_object(text, "vLLM-Ascend expert map")
    layers = data.get("layer_list")
    if not isinstance(layers, list) or not layers or data.get("moe_layer_count") != len(layers):
        msg = "not a vLLM-Ascend expert map: layer_list must hold moe_layer_count layers"
        raise ExportError(msg)
    slots = tuple(_devices(layer, number, num_ranks) for number, layer in enumerate(layers))
    layer_ids = shape.moe_layers or tuple(range(len(slots)))
    experts = shape.num_experts or 1 + max(
        (e for ranks in slots for on in ranks for e in on), default=0
    )
    return ReadPlan(layer_ids=layer_ids, num_experts=experts, slots=slots)


def _devices(layer: Any, number: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    where = f"layer {number}"
    if not isinstance(layer, dict) or layer.get("device_count") != num_ranks:
        msg = f"{where} must have device_count {num_ranks}, got {str(layer)[:60]}"
        raise ExportError(msg)
    devices = from_ranks(
        layer.get("device_list"), num_ranks, rank="device_id", experts="device_expert", where=where
    )
    if len({len(experts) for experts in devices}) > 1:
        msg = f"{where} has {[len(experts) for experts in devices][:8]} experts on its devices; "
        raise ExportError(msg + "the reader needs as many on each")
    return devices


def usage(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """The configuration that makes vLLM-Ascend follow the file."""
    del shape
    return [
        "--enable-expert-parallel --additional-config "
        f'\'{{"eplb_config": {{"expert_map_path": "{path}"}}}}\'',
        f"on {plan.num_ranks} expert-parallel ranks; the name must end in .json",
    ]


TARGET = Target(
    name="vllm-ascend", suffix=".json", check=check, render=render, parse=parse, usage=usage
)
