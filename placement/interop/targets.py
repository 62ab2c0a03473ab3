"""Export targets: check a plan for an engine, write it in the engine's form, read it back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from placement.identity import span
from placement.interop.errors import ExportError
from placement.interop.slots import describe_unequal, slots_per_rank
from placement.json_text import JsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.interop.slots import ReadPlan
    from placement.plan import PlacementPlan

# Where the Target of each name is; a module is imported when its name is asked for.
TARGETS = {
    "sglang": "placement.interop.sglang:TARGET",
    "trtllm": "placement.interop.trtllm:TARGET",
    "vllm": "placement.interop.vllm:TARGET",
    "vllm-41141": "placement.interop.vllm:TARGET_41141",
    "vllm-34811": "placement.interop.vllm:TARGET_34811",
    "vllm-ascend": "placement.interop.vllm_ascend:TARGET",
    "deepspeed": "placement.interop.deepspeed:TARGET",
    "exflow-csv": "placement.interop.exflow_csv:TARGET",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found: an error keeps the plan from being exported, a warning is to be read."""

    level: Literal["error", "warning"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine's form of a plan.

    Attributes:
        name: as on the command line.
        suffix: of the exported file.
        check: findings about a plan for a model.
        render: the file's text.
        parse: (text, shape, ranks) back to slots; refuses what the engine would refuse.
        usage: how to start the engine with the file, a line each.
    """

    name: str
    suffix: str
    check: Callable[[PlacementPlan, ModelShape], list[Finding]]
    render: Callable[[PlacementPlan, ModelShape], str]
    parse: Callable[[str, ModelShape, int], ReadPlan]
    usage: Callable[[PlacementPlan, ModelShape, Path], list[str]]


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ExportError: naming the targets there are.
    """
    if name not in TARGETS:
        msg = f"unknown target {name!r}; choose one of {', '.join([*TARGETS, 'checkpoint'])}"
        raise ExportError(msg)
    module, _, attribute = TARGETS[name].partition(":")
    target = getattr(import_module(module), attribute)
    assert isinstance(target, Target)
    return target


def read_export(name: str, path: Path, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of a file in a target's form, or of the folder of a permuted checkpoint.

    A `.pt` dump of SGLang gives the placement it ran with.

    Raises:
        ExportError: if the engine would refuse the file, or it is of another model than `shape`.
    """
    if name == "checkpoint":
        from placement.interop import checkpoint

        return _of_model(checkpoint.read_plan(path, num_ranks), shape)
    target = find_target(name)
    try:
        is_dump = path.suffix == ".pt"
        text = _map_of_dump(path) if is_dump else path.read_text(encoding="utf-8")
        return _of_model(target.parse(text, shape, num_ranks), shape)
    except (OSError, UnicodeDecodeError) as failure:
        msg = f"{path}: cannot be read: {failure}"
        raise ExportError(msg) from failure
    except ExportError as failure:
        msg = f"{path}: {failure}"
        raise ExportError(msg) from failure


def _of_model(read: ReadPlan, shape: ModelShape) -> ReadPlan:
    if shape.num_experts not in {None, read.num_experts}:
        msg = f"the file places {read.num_experts} experts a layer, the model has "
        raise ExportError(msg + str(shape.num_experts))
    if shape.moe_layers not in {None, read.layer_ids}:
        msg = (
            f"the file places layers {span(read.layer_ids)}, the model's MoE layers are "
            f"{span(shape.moe_layers or ())}"
        )
        raise ExportError(msg)
    return read


def _map_of_dump(path: Path) -> str:
    from placement.interop.torch_file import load_pt

    dump = load_pt(path)
    rows = dump.get("last_physical_to_logical_map", dump.get("physical_to_logical_map"))
    if not isinstance(rows, np.ndarray):
        msg = "the dump holds no physical_to_logical_map"
        raise ExportError(msg)
    return json.dumps({"physical_to_logical_map": rows.tolist()})


def export_text(plan: PlacementPlan, target: Target, shape: ModelShape) -> str:
    """A plan in a target's form.

    Raises:
        ExportError: with every reason why the target cannot express it.
    """
    findings = target.check(plan, shape)
    errors = [finding.text for finding in findings if finding.level == "error"]
    if errors:
        msg = f"{target.name} cannot take this plan: " + "; ".join(errors)
        raise ExportError(msg)
    return target.render(plan, shape)


def load_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ExportError: if it is anything else.
    """
    try:
        data = parse_json(text)
    except JsonError as failure:
        msg = f"not a {what}: {failure}"
        raise ExportError(msg) from failure
    if not isinstance(data, dict):
        msg = f"not a {what}: a JSON object was expected, got {type(data).__name__}"
        raise ExportError(msg)
    return data


def error(text: str) -> Finding:
    """A finding that keeps the plan from being exported."""
    return Finding(level="error", text=text)


def warning(text: str) -> Finding:
    """A finding to be read."""
    return Finding(level="warning", text=text)


def check_shape(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """Whether the plan is for the model."""
    findings = []
    if shape.num_experts is not None and shape.num_experts != plan.num_experts:
        findings.append(
            error(f"the plan has {plan.num_experts} experts, the model {shape.num_experts}")
        )
    if shape.moe_layers is not None and shape.moe_layers != plan.layer_ids:
        findings.append(
            error(
                f"the plan places layers {span(plan.layer_ids)}, the model's MoE layers are "
                f"{span(shape.moe_layers)}"
            )
        )
    return findings


def check_equal_slots(plan: PlacementPlan) -> list[Finding]:
    """Whether every rank has the same number of slots, as contiguous numbering needs."""
    if slots_per_rank(plan) is not None:
        return []
    advice = "place again with --slots-per-rank, or export with --fill"
    return [error(f"it needs equal slots on all ranks: {describe_unequal(plan)}; {advice}")]


def check_no_replicas(plan: PlacementPlan, why: str) -> list[Finding]:
    """Whether the plan is free of replicas."""
    return [error(f"{why}, and the plan has replicas")] if plan.has_replicas else []


def check_groups(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """Whether a group-limited router's groups are torn apart over nodes."""
    if shape.num_groups == 1 or plan.topology.num_nodes == 1:
        return []
    if plan.num_experts % shape.num_groups:  # of another model, as check_shape says
        return []
    size = plan.num_experts // shape.num_groups
    torn = 0
    for ranks in plan.slots:
        nodes: list[set[int]] = [set() for _ in range(shape.num_groups)]
        for rank, experts in enumerate(ranks):
            for expert in experts:
                nodes[expert // size].add(rank // plan.topology.ranks_per_node)
        torn += sum(len(group) > 1 for group in nodes)
    if not torn:
        return []
    limit = f"{shape.top_groups} of {shape.num_groups} groups"
    return [
        warning(
            f"the router uses {limit} a token, and {torn} groups (over all layers) are spread over "
            f"nodes: a token may visit more than {shape.top_groups} nodes"
        )
    ]
