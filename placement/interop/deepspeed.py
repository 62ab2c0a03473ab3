"""DeepSpeed AutoEP (0.19.8): the expert placement descriptor of each layer.

Checkpoints carry it; DeepSpeed lowers it to an affine map when it reshards a checkpoint. Its own
runtime still routes to contiguous ranks: to run a plan, permute the checkpoint (`checkpoint.py`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from placement.interop.errors import ExportError
from placement.interop.slots import ReadPlan
from placement.interop.targets import Finding, Target, check_shape, load_object, warning

if TYPE_CHECKING:
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan

VERSION = 1
ROOT = "expert_placement"


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
    data = load_object(text, "file of DeepSpeed descriptors")
    try:
        layers = {int(layer): entry for layer, entry in data[ROOT].items()}
        slots = tuple(_ranks(layers[layer], num_ranks) for layer in sorted(layers))
        num_experts = int(next(iter(layers.values()))["num_experts"])
    except (KeyError, TypeError, ValueError, StopIteration) as failure:
        if isinstance(failure, ExportError):
            raise
        msg = f"not a file of DeepSpeed descriptors: {failure!r}"
        raise ExportError(msg) from failure
    return ReadPlan(layer_ids=tuple(sorted(layers)), num_experts=num_experts, slots=slots)


def _ranks(entry: dict[str, Any], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    if entry["version"] != VERSION or entry["ep_size"] != num_ranks:
        msg = (
            f"descriptor of version {entry['version']} for {entry['ep_size']} ranks, expected "
            f"version {VERSION} for {num_ranks}"
        )
        raise ExportError(msg)
    experts = {int(item["rank"]): item["experts"] for item in entry["ranks"]}
    return tuple(tuple(int(e) for e in experts[rank]) for rank in range(num_ranks))


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
