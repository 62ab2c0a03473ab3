"""Placement strategies: one algorithm a file, one signature.

place(trace, topology, *, slots_per_rank=None, options=None) -> PlacementPlan
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from placement.strategies.options import Place, PlacementOptions, StrategyError

STRATEGIES = (
    "linear",
    "round_robin",
    "random",
    "balanced",
    "exflow_milp",
    "moetuner",
    "metis",
    "affinity",
)

__all__ = ["STRATEGIES", "PlacementOptions", "StrategyError", "get_strategy"]


def get_strategy(name: str) -> Place:
    """The `place` function of a strategy; hyphens count as underscores.

    Raises:
        StrategyError: if there is none of that name.
    """
    module = name.replace("-", "_")
    if module not in STRATEGIES:
        msg = f"unknown strategy {name!r}; choose one of {', '.join(STRATEGIES)}"
        raise StrategyError(msg)
    return cast("Place", import_module(f"placement.strategies.{module}").place)
