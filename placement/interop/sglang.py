"""SGLang: the file of `--init-expert-location` (0.5.23).

One key, `physical_to_logical_map`: a row of P logical experts for every decoder layer, dense ones
too. SGLang passes the file's keys on as arguments, so another key stops it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from placement.interop.errors import ExportError
from placement.interop.slots import ReadPlan, check_rows, from_rows, to_rows
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

KEY = "physical_to_logical_map"


def check(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """Equal slots; one row for every decoder layer."""
    findings = [*check_shape(plan, shape), *check_equal_slots(plan), *check_groups(plan, shape)]
    if plan.has_replicas:
        findings.append(
            warning(
                "SGLang sends a token to the nearest replica (same rank, then same node); "
                "several ranks then share a hot expert unevenly (sglang #13423)"
            )
        )
    return findings


def render(plan: PlacementPlan, shape: ModelShape) -> str:
    """Rows of all decoder layers; a dense layer gets expert i mod E in slot i."""
    rows = dict(zip(plan.layer_ids, to_rows(plan), strict=True))
    width = len(rows[plan.layer_ids[0]])
    trivial = [slot % plan.num_experts for slot in range(width)]
    num_layers = shape.num_layers or max(plan.layer_ids) + 1
    lines = ",\n".join(json.dumps(rows.get(layer, trivial)) for layer in range(num_layers))
    return f'{{"{KEY}": [\n{lines}\n]}}\n'


def parse(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of a file that SGLang would take.

    Raises:
        ExportError: for other keys, or rows that do not fit the model.
    """
    data = load_object(text, "SGLang expert location")
    if list(data) != [KEY]:
        msg = f"SGLang takes one key, {KEY!r}, and stops on any other; the file has {list(data)}"
        raise ExportError(msg)
    rows = check_rows(data[KEY])
    if shape.num_layers is not None and len(rows) != shape.num_layers:
        msg = (
            f"{len(rows)} rows, the model has {shape.num_layers} decoder layers; SGLang needs a "
            f"row for each, dense ones too"
        )
        raise ExportError(msg)
    layer_ids = shape.moe_layers or tuple(range(len(rows)))
    if max(layer_ids) >= len(rows):
        msg = f"{len(rows)} rows, the model's last MoE layer is {max(layer_ids)}"
        raise ExportError(msg)
    num_experts = shape.num_experts or max(max(row) for row in rows) + 1
    slots = from_rows([rows[layer] for layer in layer_ids], num_ranks)
    return ReadPlan(layer_ids=layer_ids, num_experts=num_experts, slots=slots)


def usage(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """The flags that make SGLang follow the file."""
    redundant = len(to_rows(plan)[0]) - plan.num_experts
    del shape
    return [
        f"--ep-size {plan.num_ranks} --ep-num-redundant-experts {redundant} "
        f"--init-expert-location {path} --moe-a2a-backend deepep",
        "without --enable-eplb, which would replace the plan when it first rebalances",
    ]


TARGET = Target(name="sglang", suffix=".json", check=check, render=render, parse=parse, usage=usage)
