"""The paper's published solutions: CSV `Expert,Node`, expert id = MoE layer * experts + expert.

The "node" of that file is a rank. It has no replicas.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import numpy as np

from placement.interop.errors import ExportError
from placement.interop.slots import ReadPlan
from placement.interop.targets import Finding, Target, check_no_replicas, check_shape

if TYPE_CHECKING:
    from pathlib import Path

    from placement.interop.model_shape import ModelShape
    from placement.plan import PlacementPlan

HEADER = ["Expert", "Node"]


def check(plan: PlacementPlan, shape: ModelShape) -> list[Finding]:
    """No replicas."""
    one_rank = "an expert has one line, so one rank"
    return [*check_shape(plan, shape), *check_no_replicas(plan, one_rank)]


def render(plan: PlacementPlan, shape: ModelShape) -> str:
    """A line an expert."""
    del shape
    rank_of_expert = plan.hosts().argmax(axis=2).ravel()
    lines = [",".join(HEADER), *(f"{e},{rank}" for e, rank in enumerate(rank_of_expert))]
    return "\n".join(lines) + "\n"


def parse(text: str, shape: ModelShape, num_ranks: int) -> ReadPlan:
    """The slots of a solution; experts in rising order on each rank.

    Raises:
        ExportError: if lines are missing or ranks are out of range.
    """
    rank_of = _read_lines(text)
    num_experts = shape.num_experts
    if num_experts is None or len(rank_of) % num_experts:
        msg = f"{len(rank_of)} experts in all; give --num-experts (per layer), a divisor of that"
        raise ExportError(msg)
    if rank_of.min() < 0 or rank_of.max() >= num_ranks:
        msg = f"ranks run from {rank_of.min()} to {rank_of.max()}, expected 0 to {num_ranks - 1}"
        raise ExportError(msg)
    layers = rank_of.reshape(-1, num_experts)
    slots = tuple(
        tuple(tuple(int(e) for e in np.flatnonzero(row == r)) for r in range(num_ranks))
        for row in layers
    )
    layer_ids = shape.moe_layers or tuple(range(len(layers)))
    return ReadPlan(layer_ids=layer_ids, num_experts=num_experts, slots=slots)


def _read_lines(text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    try:
        header, *lines = [line for line in csv.reader(io.StringIO(text)) if line]
        pairs = np.array([(int(expert), int(rank)) for expert, rank in lines], dtype=np.int64)
    except (ValueError, OverflowError, csv.Error) as failure:
        msg = f"lines of {','.join(HEADER)!r} were expected: {failure}"
        raise ExportError(msg) from failure
    if header != HEADER:
        msg = f"the first line must be {','.join(HEADER)!r}"
        raise ExportError(msg)
    if not len(pairs) or not np.array_equal(np.sort(pairs[:, 0]), np.arange(len(pairs))):
        msg = "expert ids must run from 0 without gaps, each once"
        raise ExportError(msg)
    ranks = np.empty(len(pairs), dtype=np.int64)
    ranks[pairs[:, 0]] = pairs[:, 1]
    return ranks


def usage(plan: PlacementPlan, shape: ModelShape, path: Path) -> list[str]:
    """What the file is for."""
    del plan, shape
    return [f"{path} compares with the solutions of arXiv 2401.08383; no engine loads it"]


TARGET = Target(
    name="exflow-csv", suffix=".csv", check=check, render=render, parse=parse, usage=usage
)
