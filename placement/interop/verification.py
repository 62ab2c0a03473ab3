"""What a plan was expected to do, beside what it did while a trace was recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from placement.interop.errors import RecordError
from placement.interop.model_shape import ModelShape
from placement.interop.targets import read_export
from placement.traffic import PROTOCOLS, count_traffic, require_routing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace
    from placement.traffic import Traffic

ROWS = ("dispatch", "combine", "total", "inter_node", "inter_node_dedup")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure as predicted and as recorded."""

    name: str
    predicted: float
    recorded: float

    @property
    def ratio(self) -> float:
        """Recorded over predicted; 1 if both are zero."""
        if self.predicted == 0:
            return 1.0 if self.recorded == 0 else float("inf")
        return self.recorded / self.predicted

    def is_off(self, tolerance: float) -> bool:
        """Whether more was recorded than predicted, beyond the tolerance."""
        return self.ratio > 1 + tolerance


def compare(
    plan: PlacementPlan,
    recorded: RoutingTrace,
    expected: RoutingTrace | None,
    *,
    protocol: str = "home",
) -> list[Comparison]:
    """Rows per token, imbalance and the busiest rank's share of the load, expected and recorded.

    Args:
        plan: the plan in use.
        recorded: routing recorded meanwhile.
        expected: the routing it was made from; None takes the plan's own predictions.
        protocol: "home" or "coherent".

    Raises:
        RecordError: if nothing was predicted, or for tokens that start where the recording cannot
            tell.
    """
    of_protocol = next((known for known in PROTOCOLS if known == protocol), None)
    if of_protocol is None:
        msg = f"unknown protocol {protocol!r}; choose home or coherent"
        raise RecordError(msg)
    require_routing(recorded, "counting rows")
    if expected is not None and (recorded.foretold_ids is None or expected.foretold_ids is None):
        # Not every recording says where tokens would start: count both from home.
        recorded, expected = (replace(trace, foretold_ids=None) for trace in (recorded, expected))
    measured = _figures(count_traffic(recorded, plan, protocol=of_protocol))
    if expected is not None:
        predicted = _figures(count_traffic(expected, plan, protocol=of_protocol))
    else:
        predicted = _predictions(plan.predicted, protocol)
        if recorded.foretold_ids is None and _start(plan.predicted, protocol) == "foretold":
            msg = (
                "the plan's rows are of tokens that start where their first experts are foretold "
                "to be, which the recording does not say; give --expected, the trace the plan was "
                "made from"
            )
            raise RecordError(msg)
    names = [name for name in measured if name in predicted]
    if not names:
        msg = (
            f"the plan predicts no figures for protocol {protocol}; give --expected, the trace it "
            f"was made from"
        )
        raise RecordError(msg)
    return [Comparison(name=n, predicted=predicted[n], recorded=measured[n]) for n in names]


def _figures(traffic: Traffic) -> dict[str, float]:
    rows = {f"rows/token {name}": value for name, value in traffic.rows_per_token().items()}
    balance = {f"imbalance {name}": value for name, value in traffic.imbalance().items()}
    share = traffic.load.sum(axis=0) / max(1, int(traffic.load.sum()))
    return {**rows, **balance, "busiest rank's share": float(share.max())}


def _start(predicted: Mapping[str, Any], protocol: str) -> Any:
    """Where tokens start whose figures a plan carries under a protocol."""
    return predicted.get("start") if predicted.get("protocol") == protocol else "home"


def _predictions(predicted: Mapping[str, Any], protocol: str) -> dict[str, float]:
    """The figures a plan carries: flat, or under the protocol's name."""
    figures = predicted.get(protocol, predicted if predicted.get("protocol") == protocol else {})
    try:
        rows, balance = figures.get("rows_per_token", {}), figures.get("imbalance", {})
        found = {f"rows/token {name}": float(rows[name]) for name in ROWS if name in rows}
        return found | {f"imbalance {name}": float(value) for name, value in balance.items()}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        msg = f"the plan's predicted figures have the wrong type: {error}; place its trace again"
        raise RecordError(msg) from error


def served_differences(plan: PlacementPlan, served: Path, target: str, config: Path | None) -> int:
    """In how many (layer, rank) pairs the placement an engine reports differs from the plan.

    The order of experts on a rank does not matter.
    """
    shape = ModelShape.from_config(config) if config else ModelShape.of_plan(plan)
    read = read_export(target, served, shape, plan.num_ranks)
    if read.layer_ids != plan.layer_ids:
        msg = f"{served} places layers {read.layer_ids}, the plan {plan.layer_ids}"
        raise RecordError(msg)
    return sum(
        sorted(theirs) != sorted(ours)
        for their_ranks, our_ranks in zip(read.slots, plan.slots, strict=True)
        for theirs, ours in zip(their_ranks, our_ranks, strict=True)
    )
