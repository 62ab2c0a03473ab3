"""What changes from one plan to another: copies that move, bytes to migrate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from placement.errors import UserError

if TYPE_CHECKING:
    from placement.plan import PlacementPlan


class ComparisonError(UserError):
    """Two plans that cannot follow each other."""


def compare_plans(
    old: PlacementPlan, new: PlacementPlan, *, expert_bytes: int | None = None
) -> dict[str, Any]:
    """Copies that a change of plan loads and drops.

    Args:
        old: the plan in force.
        new: the plan to come.
        expert_bytes: bytes of one expert's weights; without it bytes are None.

    Raises:
        ComparisonError: if the plans differ in model, layers, experts or ranks.
    """
    difference = old.identity.difference(new.identity, names=("the old plan", "the new one"))
    if difference is None and old.num_ranks != new.num_ranks:
        difference = f"num_ranks is {old.num_ranks} in the old plan, {new.num_ranks} in the new one"
    if difference is not None:
        msg = f"{difference}; compare plans for the same model and number of ranks"
        raise ComparisonError(msg)
    before, after = old.hosts(), new.hosts()
    loaded, dropped = after & ~before, before & ~after
    by_rank = loaded.sum(axis=(0, 1))
    return {
        "copies": int(after.sum()),
        "loaded": int(loaded.sum()),
        "dropped": int(dropped.sum()),
        "layers_changed": int((loaded | dropped).any(axis=(1, 2)).sum()),
        "loaded_by_rank": by_rank.tolist(),
        "bytes": None if expert_bytes is None else int(loaded.sum()) * expert_bytes,
        "bytes_busiest_rank": None if expert_bytes is None else int(by_rank.max()) * expert_bytes,
    }
