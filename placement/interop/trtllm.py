"""TensorRT-LLM: the YAML file of `moe_config.load_balancer`.

    num_slots: 288
    initial_global_assignments: {3: [...], 4: [...]}
    layer_updates_per_iter: 0

Layers have the model's own numbers. The reader is strict: another key stops it. A
multi-token-prediction layer needs a line too (TensorRT-LLM #13974). We write this YAML by hand and
read only what we write, so no YAML library is needed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from placement.interop.errors import ExportError
from placement.interop.slots import ReadPlan, check_rows, from_rows, to_rows
from placement.interop.targets import (
    Finding,
    Target,
    check_equal_slots,
    check_groups,
    check_shape,
    warning,
)
from placement.json_text import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan

KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")
SCALAR = re.compile(r"(\w+):\s*(-?\d+)?\s*(?:#.*)?$")
LAYER = re.compile(r"\s+(\d+):\s*(\[[\d,\s]*\])\s*$")


def check(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """Equal slots; more than one rank."""
    findings = [*check_shape(plan, shape), *check_equal_slots(plan), *check_groups(plan, shape)]
    if plan.num_ranks == 1:
        findings.append(warning("TensorRT-LLM ignores the load balancer with one rank"))
    if shape.num_mtp_layers:
        findings.append(
            warning(f"{shape.num_mtp_layers} multi-token-prediction layer(s) get the default slots")
        )
    return findings


def render(plan: PlacementPlan, shape: ModelShape) -> str:
    """One line a layer, multi-token-prediction layers last."""
    rows = dict(zip(plan.layer_ids, to_rows(plan), strict=True))
    width = len(rows[plan.layer_ids[0]])
    first = shape.num_layers or max(plan.layer_ids) + 1
    for layer in range(first, first + shape.num_mtp_layers):
        rows.setdefault(layer, _default_row(plan, width))
    lines = [f"  {layer}: {json.dumps(row)}" for layer, row in rows.items()]
    return "\n".join(
        [
            f"num_slots: {width}",
            "initial_global_assignments:",
            *lines,
            "layer_updates_per_iter: 0\n",
        ]
    )


def _default_row(plan: PlacementPlan, width: int) -> list[int]:
    """Slots as TensorRT-LLM fills them when nobody says: each rank starts at its own share."""
    experts, ranks = plan.num_experts, plan.num_ranks
    share = width // ranks
    return [(r * experts // ranks + i) % experts for r in range(ranks) for i in range(share)]


def parse(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of a load balancer file in the form that `render` writes.

    Raises:
        ExportError: for other keys, or rows that do not have `num_slots` entries.
    """
    scalars, layers = _read_lines(text)
    unknown = sorted(set(scalars) - set(KEYS))
    if unknown or "num_slots" not in scalars or not layers:
        msg = f"TensorRT-LLM takes the keys {', '.join(KEYS)} and no other; found {sorted(scalars)}"
        raise ExportError(msg)
    wanted = shape.moe_layers or tuple(sorted(layers))
    missing = sorted(set(wanted) - set(layers))
    if missing:
        msg = f"layers {missing[:4]} are missing; TensorRT-LLM looks up every MoE layer"
        raise ExportError(msg)
    rows = check_rows([layers[layer] for layer in wanted])
    if len(rows[0]) != scalars["num_slots"]:
        msg = f"num_slots is {scalars['num_slots']}, the rows have {len(rows[0])}"
        raise ExportError(msg)
    num_experts = shape.num_experts or max(max(row) for row in rows) + 1
    return ReadPlan(layer_ids=wanted, num_experts=num_experts, slots=from_rows(rows, num_ranks))


def _read_lines(text: str) -> tuple[dict[str, int | None], dict[int, list[int]]]:
    scalars: dict[str, int | None] = {}
    layers: dict[int, list[int]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        layer, scalar = LAYER.match(line), SCALAR.match(line)
        try:
            if layer is not None:
                layers[int(layer[1])] = parse_json(layer[2])
            elif scalar is not None:
                scalars[scalar[1]] = None if scalar[2] is None else int(scalar[2])
        except ValueError:
            layer = scalar = None
        if layer is None and scalar is None:
            msg = f"line {number} is not `key: number` or `  layer: [experts]`: {line[:60]!r}"
            raise ExportError(msg)
    return scalars, layers


def usage(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """The options that make TensorRT-LLM follow the file."""
    del shape
    return [
        f"moe_config: {{backend: WIDEEP, load_balancer: {path}}}, enable_attention_dp: true, "
        f"moe_expert_parallel_size: {plan.num_ranks}",
        "without attention-DP, on one rank, or for an architecture that is not in its list, "
        "TensorRT-LLM ignores the file without a word (#18626)",
    ]


TARGET = Target(name="trtllm", suffix=".yaml", check=check, render=render, parse=parse, usage=usage)
