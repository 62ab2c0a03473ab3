"""vLLM: plans in the form of the open pull requests that load a file.

vLLM 0.33 loads none; there `exflow.vllm_plugin` serves the plan itself as the EPLB policy. The forms:
`vllm`: rows of P experts, one a MoE layer (#49572 `initial_expert_map_path`, #53022);
`vllm-41141`: a record of a JSON Lines file (`initial_mapping_path`);
`vllm-34811`: one rank an expert, the same for all layers (`--expert-placement-file`).
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
    check_no_replicas,
    check_shape,
    error,
    load_object,
    warning,
)
from placement.json_text import JsonError, parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan, Slots

RECORD_TYPE = "eplb_initial_mapping"


def check(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """Equal slots; replicas are chosen blindly."""
    findings = [*check_shape(plan, shape), *check_equal_slots(plan), *check_groups(plan, shape)]
    if plan.has_replicas:
        findings.append(
            warning(
                "vLLM picks a replica by a hash of the token's place in the batch, near or far; "
                "the plan's traffic figures assume the nearest"
            )
        )
    return findings


def render(plan: PlacementPlan, shape: ModelShape) -> str:
    """Rows of P logical experts, one a MoE layer."""
    del shape
    return "[\n" + ",\n".join(json.dumps(row) for row in to_rows(plan)) + "\n]\n"


def parse(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of rows.

    Raises:
        ExportError: if the file is not rows of one length, one a MoE layer.
    """
    try:
        data = parse_json(text)
    except JsonError as failure:
        msg = f"not a vLLM expert map: {failure}"
        raise ExportError(msg) from failure
    return _read_rows(check_rows(data), shape, num_ranks)


def _read_rows(rows: list[list[int]], shape: ModelShape, num_ranks: int) -> ReadPlan:
    layer_ids = shape.moe_layers or tuple(range(len(rows)))
    if len(rows) != len(layer_ids):
        msg = f"{len(rows)} rows, the model has {len(layer_ids)} MoE layers; vLLM counts only those"
        raise ExportError(msg)
    num_experts = shape.num_experts or max(max(row) for row in rows) + 1
    slots = from_rows(rows, num_ranks)
    return ReadPlan(layer_ids=layer_ids, num_experts=num_experts, slots=slots)


def usage(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """The flags that make vLLM follow the plan through the plug-in."""
    del shape
    redundant = len(to_rows(plan)[0]) - plan.num_experts
    config = {"num_redundant_experts": redundant, "step_interval": 200, "window_size": 100}
    return [
        f"with vLLM 0.33, the plan itself: EXFLOW_PLAN=plan.json vllm serve MODEL "
        f"--enable-expert-parallel --enable-eplb --eplb-config '{json.dumps(config)}'",
        f"on {plan.num_ranks} expert-parallel ranks; in force after 3/4 of step_interval",
        f"{path} is for --eplb-config initial_expert_map_path (vllm #49572) or expert_map_path "
        f"(#53022), not merged",
    ]


def render_41141(plan: PlacementPlan, shape: ModelShape) -> str:
    """One record; layers are numbered among the MoE layers."""
    del shape
    rows = to_rows(plan)
    record = {
        "record_type": RECORD_TYPE,
        "version": 1,
        "num_redundant_experts": len(rows[0]) - plan.num_experts,
        "num_slots": len(rows[0]),
        "initial_global_assignments": {str(i): row for i, row in enumerate(rows)},
    }
    return json.dumps(record) + "\n"


def parse_41141(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of the mapping record; other records in the file are passed over.

    Raises:
        ExportError: if there is none, or its counts disagree.
    """
    records = [load_object(line, "JSON Lines file") for line in text.splitlines() if line.strip()]
    record = next((r for r in records if r.get("record_type") == RECORD_TYPE), None)
    if record is None or record.get("version") != 1:
        msg = f"no record of type {RECORD_TYPE!r} and version 1"
        raise ExportError(msg)
    layers = record.get("initial_global_assignments")
    if not isinstance(layers, dict) or layers.keys() != {str(i) for i in range(len(layers))}:
        msg = 'initial_global_assignments must name the MoE layers "0", "1", ..., got '
        raise ExportError(msg + str(layers)[:60])
    rows = check_rows([layers[str(i)] for i in range(len(layers))])
    plan = _read_rows(rows, shape, num_ranks)
    expected = (len(rows[0]), len(rows[0]) - plan.num_experts)
    if (record.get("num_slots"), record.get("num_redundant_experts")) != expected:
        msg = f"num_slots and num_redundant_experts must be {expected[0]} and {expected[1]}"
        raise ExportError(msg)
    return plan


def usage_41141(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """The options of the open pull request."""
    del plan, shape
    return [f'--eplb-config \'{{"initial_mapping_path": "{path}"}}\' (vllm #41141, not merged)']


def check_34811(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """One rank an expert, the same in all layers."""
    one_rank = "it gives one rank an expert"
    findings = [*check_shape(plan, shape), *check_no_replicas(plan, one_rank)]
    sets = {tuple(frozenset(experts) for experts in ranks) for ranks in plan.slots}
    if len(sets) > 1:
        findings.append(error("it has one map for all layers, and the plan's layers differ"))
    return [*findings, *check_equal_slots(plan)]


def render_34811(plan: PlacementPlan, shape: ModelShape) -> str:
    """The rank of each expert."""
    del shape
    return json.dumps({"expert_to_ep_rank": plan.hosts()[0].argmax(axis=1).tolist()}) + "\n"


def parse_34811(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of a rank list, for all MoE layers of the model.

    Raises:
        ExportError: if ranks are out of range.
    """
    ranks = load_object(text, "vLLM expert placement file").get("expert_to_ep_rank")
    if (
        not isinstance(ranks, list)
        or not ranks
        or not all(type(rank) is int and 0 <= rank < num_ranks for rank in ranks)
    ):
        msg = f"expert_to_ep_rank must list ranks from 0 to {num_ranks - 1}"
        raise ExportError(msg)
    layer_ids = shape.need_moe_layers()
    layer = tuple(
        tuple(expert for expert, at in enumerate(ranks) if at == rank) for rank in range(num_ranks)
    )
    slots: Slots = tuple(layer for _ in layer_ids)
    return ReadPlan(layer_ids=layer_ids, num_experts=len(ranks), slots=slots)


def usage_34811(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """The option of the open pull request."""
    del plan, shape
    return [f"--expert-placement-file {path} (vllm #34811, not merged)"]


TARGET = Target(name="vllm", suffix=".json", check=check, render=render, parse=parse, usage=usage)
TARGET_41141 = Target(
    name="vllm-41141",
    suffix=".jsonl",
    check=check,
    render=render_41141,
    parse=parse_41141,
    usage=usage_41141,
)
TARGET_34811 = Target(
    name="vllm-34811",
    suffix=".json",
    check=check_34811,
    render=render_34811,
    parse=parse_34811,
    usage=usage_34811,
)
