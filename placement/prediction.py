"""What a plan is worth on the trace it was made from: the figures that its file carries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from placement.bounds import lower_bound
from placement.timing import rows_by_kind
from placement.trace import COUNTS
from placement.traffic import count_load, count_traffic, summarize_imbalance

if TYPE_CHECKING:
    from placement.plan import PlacementPlan
    from placement.strategies import PlacementOptions
    from placement.trace import RoutingTrace
    from placement.traffic import Traffic


def with_predictions(
    plan: PlacementPlan, trace: RoutingTrace, options: PlacementOptions
) -> PlacementPlan:
    """The plan with its rows, its imbalance and the bound of any plan; of loads, the imbalance."""
    setting: dict[str, Any] = {
        "protocol": options.protocol,
        "coherence_domain": options.coherence_domain,
    }
    if trace.phase == COUNTS:
        figures = _load_figures(plan, trace, setting)
        return replace(plan, predicted={**setting, **figures, **plan.predicted})
    traffic = count_traffic(trace, plan, **setting)
    sent = rows_by_kind(trace, plan, backend=options.backend, traffic=traffic, **setting)
    home = traffic if options.protocol == "home" else count_traffic(trace, plan, protocol="home")
    start = "home" if trace.foretold_ids is None or options.protocol == "home" else "foretold"
    predicted = {**setting, "start": start, **_figures(traffic)}
    predicted |= {"sent": sent, "home": _figures(home)}
    fullest = max(len(experts) for ranks in plan.slots for experts in ranks)
    bound = lower_bound(trace, plan.topology, slots_per_rank=fullest, **setting)
    return replace(
        plan,
        predicted={**predicted, **plan.predicted},
        bound=bound.summary(traffic.rows_per_token()["total"]),
    )


def _figures(traffic: Traffic) -> dict[str, Any]:
    return {"rows_per_token": traffic.rows_per_token(), "imbalance": traffic.imbalance()}


def _load_figures(
    plan: PlacementPlan, trace: RoutingTrace, setting: dict[str, Any]
) -> dict[str, Any]:
    load, home = count_load(trace, plan, **setting), count_load(trace, plan, protocol="home")
    return {
        "imbalance": summarize_imbalance(load),
        "home": {"imbalance": summarize_imbalance(home)},
    }
