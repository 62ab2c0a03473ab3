"""Slot rows: the form in which engines hold a plan.

Engines number physical experts rank by rank: with P slots on W ranks, rank r owns slots
[r P/W, (r + 1) P/W), and a row of P logical experts describes a layer. So every rank must hold the
same number of slots, in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from placement.interop.errors import ExportError
from placement.plan import PlacementPlan, PlanError, Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from placement.plan import Slots
    from placement.topology import Topology


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """Slots as an engine's file gives them.

    Attributes:
        layer_ids: the model's index of each MoE layer.
        num_experts: logical experts per layer.
        slots: slots[layer][rank], as in PlacementPlan.
        model: the model's name if the file tells.
    """

    layer_ids: tuple[int, ...]
    num_experts: int
    slots: Slots
    model: str = ""

    def __post_init__(self) -> None:
        if not self.slots or len(self.slots) != len(self.layer_ids):
            msg = f"the file places {len(self.slots)} layers, expected {len(self.layer_ids)}"
            raise ExportError(msg)

    def to_plan(self, topology: Topology, *, model: str, source: str) -> PlacementPlan:
        """A plan of these slots.

        Raises:
            ExportError: if the file is for another number of ranks or no valid plan.
        """
        ranks = len(self.slots[0])
        if ranks != topology.num_ranks:
            msg = f"the file places experts on {ranks} ranks, --nodes and --ranks-per-node say "
            raise ExportError(msg + str(topology.num_ranks))
        try:
            return PlacementPlan(
                model=self.model or model,
                num_experts=self.num_experts,
                layer_ids=self.layer_ids,
                topology=topology,
                strategy=Strategy(name=f"imported from {source}"),
                slots=self.slots,
            )
        except PlanError as error:
            msg = f"not a usable placement: {error}"
            raise ExportError(msg) from error


def slots_per_rank(plan: PlacementPlan) -> int | None:
    """The number of slots that every rank has in every layer; None if they differ."""
    counts = {len(experts) for ranks in plan.slots for experts in ranks}
    return counts.pop() if len(counts) == 1 else None


def fill_slots(plan: PlacementPlan) -> PlacementPlan:
    """The plan with every rank filled to the fullest rank's number of slots, by more replicas.

    An unused slot gets the expert with the fewest copies on the rank's node, then in all, then of
    the lowest number, among those not on the rank.
    """
    width = max(len(experts) for ranks in plan.slots for experts in ranks)
    return replace(plan, slots=tuple(_fill_layer(plan, ranks, width) for ranks in plan.slots))


def _fill_layer(
    plan: PlacementPlan, ranks: tuple[tuple[int, ...], ...], width: int
) -> tuple[tuple[int, ...], ...]:
    filled = [list(experts) for experts in ranks]
    per_node = plan.topology.ranks_per_node
    for rank, experts in enumerate(filled):
        first = rank - rank % per_node
        while len(experts) < width:
            near = [e for on_rank in filled[first : first + per_node] for e in on_rank]
            everywhere = [e for on_rank in filled for e in on_rank]
            spare = [e for e in range(plan.num_experts) if e not in experts]
            experts.append(min(spare, key=lambda e: (near.count(e), everywhere.count(e), e)))
    return tuple(tuple(experts) for experts in filled)


def describe_unequal(plan: PlacementPlan) -> str:
    """Where the ranks first differ in slots."""
    expected = len(plan.slots[0][0])
    for layer, ranks in zip(plan.layer_ids, plan.slots, strict=True):
        for rank, experts in enumerate(ranks):
            if len(experts) != expected:
                return (
                    f"rank {rank} holds {len(experts)} experts at layer {layer}, "
                    f"rank 0 holds {expected} at layer {plan.layer_ids[0]}"
                )
    return "all ranks hold the same number"


def to_rows(plan: PlacementPlan) -> list[list[int]]:
    """The P logical experts of each layer, rank by rank.

    >>> import numpy as np
    >>> from placement.topology import Topology
    >>> plan = PlacementPlan.from_rank_of_expert(
    ...     np.array([[1, 0, 1, 0]]), model="toy", layer_ids=(3,),
    ...     topology=Topology(num_nodes=1, ranks_per_node=2), strategy=Strategy(name="test"))
    >>> to_rows(plan)
    [[1, 3, 0, 2]]
    """
    return [[expert for experts in ranks for expert in experts] for ranks in plan.slots]


def check_rows(rows: object) -> list[list[int]]:
    """Rows as a file gives them.

    Raises:
        ExportError: unless they are lists of whole numbers, all of one length.
    """
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        msg = "a list of rows, one a layer, was expected"
        raise ExportError(msg)
    for number, row in enumerate(rows):
        _check_experts(row, f"row {number}")
        if not row or len(row) != len(rows[0]):
            msg = f"row {number} has {len(row)} slots, row 0 has {len(rows[0])}"
            raise ExportError(msg)
    return rows


def _check_experts(experts: object, where: str) -> None:
    if not (isinstance(experts, list) and all(_is_number(e) for e in experts)):
        msg = f"{where} must hold expert numbers, got {str(experts)[:60]}"
        raise ExportError(msg)


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0


def from_ranks(
    entries: object, num_ranks: int, *, rank: str, experts: str, where: str
) -> tuple[tuple[int, ...], ...]:
    """The slots of a layer that is a list of `{rank: 0, experts: [4, 2]}`.

    Args:
        entries: as the file gives them.
        num_ranks: ranks there must be, each once.
        rank: key of the rank.
        experts: key of its experts.
        where: names the layer in an error.

    Raises:
        ExportError: for anything else.
    """
    found: dict[int, tuple[int, ...]] = {}
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or not _is_number(entry.get(rank)):
            msg = f"{where}: {rank!r} must number every entry, got {str(entry)[:60]}"
            raise ExportError(msg)
        _check_experts(entry.get(experts), f"{where}, {rank} {entry[rank]}: {experts!r}")
        if entry[rank] in found:
            msg = f"{where} lists {rank} {entry[rank]} twice"
            raise ExportError(msg)
        found[entry[rank]] = tuple(entry[experts])
    if sorted(found) != list(range(num_ranks)):
        msg = f"{where} must list {rank} 0 to {num_ranks - 1}, got {sorted(found)[:8]}"
        raise ExportError(msg)
    return tuple(found[number] for number in range(num_ranks))


def from_rows(rows: Sequence[Sequence[int]], num_ranks: int) -> Slots:
    """The slots of rows of P logical experts.

    Raises:
        ExportError: if P is not a multiple of the number of ranks.
    """
    result = []
    for row in rows:
        width, rest = divmod(len(row), num_ranks)
        if rest or not width:
            msg = f"{len(row)} slots cannot be shared equally by {num_ranks} ranks"
            raise ExportError(msg)
        result.append(tuple(tuple(row[r * width : (r + 1) * width]) for r in range(num_ranks)))
    return tuple(result)
