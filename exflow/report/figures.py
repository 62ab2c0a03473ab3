"""The numbers of a report: what was profiled, what each plan costs, what a run measured."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from placement.errors import UserError
from placement.json_text import parse_json
from placement.merging import merge_traces
from placement.plan import PlacementPlan
from placement.stability import describe_stability
from placement.statistics import describe
from placement.strategies.linear import place as place_linear
from placement.topology import Topology
from placement.trace import RoutingTrace
from placement.traffic import PROTOCOLS, Protocol, Traffic, count_traffic, require_routing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class ReportError(UserError):
    """Files that cannot be shown together."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A plan under a protocol, counted on the tokens of a trace.

    Attributes:
        plan_name: The plan's name in the report, unique.
        protocol: "home" or "coherent".
        traffic: Its rows and load.
    """

    plan_name: str
    protocol: Protocol
    traffic: Traffic

    @property
    def label(self) -> str:
        """As the rest of the project writes it: protocol/strategy."""
        return f"{self.protocol}/{self.plan_name}"

    @property
    def rows(self) -> float:
        """Rows per token, both ways."""
        return self.traffic.rows_per_token()["total"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `exflow run --metrics` measured.

    Attributes:
        file: The file's name.
        model: The model's name.
        label: protocol/strategy.
        num_ranks: Ranks that took part.
        tokens_per_second: Generated tokens, all ranks.
        rows_per_token: Rows counted on the wire while decoding, by kind.
        predicted_rows_per_token: What `placement.traffic` counts for the same routing.
        is_as_predicted: Whether the two agree for every layer and pair of ranks.
        imbalance: Max / mean load over ranks, mean over layers; None if nothing was decoded.
        seconds: Time by section of the decode steps, mean over ranks.
    """

    file: str
    model: str
    label: str
    num_ranks: int
    tokens_per_second: float
    rows_per_token: Mapping[str, float]
    predicted_rows_per_token: Mapping[str, float]
    is_as_predicted: bool
    imbalance: float | None
    seconds: Mapping[str, float]

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read `exflow.metrics/1`.

        Raises:
            ReportError: naming the file and what is wrong with it.
        """
        try:
            data = parse_json(path.read_bytes())
            return cls(
                file=path.name,
                model=data["model"],
                label=f"{data['protocol']}/{data['strategy']}",
                num_ranks=int(data["world_size"]),
                tokens_per_second=float(data["tokens_per_second"]),
                rows_per_token=data["rows_per_token"],
                predicted_rows_per_token=data["predicted"].get("rows_per_token", {}),
                is_as_predicted=bool(data["measured_equals_predicted"]),
                imbalance=data["predicted"].get("imbalance", {}).get("mean"),
                seconds=data["phases"]["decode"]["seconds"],
            )
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            msg = f"{path}: not metrics of `exflow run --metrics`: {error!r}"
            raise ReportError(msg) from error


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """All that a report says of one model.

    Attributes:
        trace: The profile.
        counted_on: The tokens that plans are counted on: a held-out trace, or the profile itself.
        is_held_out: Whether the former.
        affinity: `placement.statistics.describe` of the profile.
        stability: `placement.stability.describe_stability` of the profile.
        plans: By name; "linear" is always there, and first.
        arms: Every plan under every protocol, the baseline home/linear first.
        runs: What was measured.
    """

    trace: RoutingTrace
    counted_on: RoutingTrace
    is_held_out: bool
    affinity: dict[str, Any]
    stability: dict[str, Any]
    plans: dict[str, PlacementPlan]
    arms: tuple[Arm, ...]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The model's."""
        return self.trace.model

    @property
    def baseline(self) -> Arm:
        """home/linear."""
        return self.arms[0]

    @property
    def best(self) -> Arm:
        """The arm with the fewest rows."""
        return min(self.arms, key=lambda arm: arm.rows)


def gather(
    traces: Sequence[Path],
    plans: Sequence[Path],
    *,
    held_out: Sequence[Path] = (),
    metrics: Sequence[Path] = (),
) -> list[ModelFigures]:
    """Reads and counts; plans, held-out traces and metrics go to the profile of their model.

    Raises:
        ReportError: two profiles of one model, or a file of a model that was not profiled.
    """
    profiles: dict[str, RoutingTrace] = {}
    for path in traces:
        trace = RoutingTrace.load(path)
        require_routing(trace, "report")
        if profiles.setdefault(_key(trace.model), trace) is not trace:
            msg = f"{path} is a second trace of {trace.model}; give one --trace a model"
            raise ReportError(msg)
    named_plans = _by_model([(path, PlacementPlan.load(path)) for path in plans], profiles)
    others = _by_model([(path, RoutingTrace.load(path)) for path in held_out], profiles)
    runs = _by_model([(path, Run.load(path)) for path in metrics], profiles)
    return [
        _figures(
            trace,
            plans=named_plans[key],
            held_out=[found for _, found in others[key]],
            runs=[found for _, found in runs[key]],
        )
        for key, trace in profiles.items()
    ]


def _figures(
    trace: RoutingTrace,
    *,
    plans: list[tuple[Path, PlacementPlan]],
    held_out: list[RoutingTrace],
    runs: list[Run],
) -> ModelFigures:
    counted_on = merge_traces(held_out) if held_out else trace
    named = _name_plans(trace, plans)
    arms = [
        Arm(
            plan_name=name,
            protocol=protocol,
            traffic=count_traffic(counted_on, plan, protocol=protocol),
        )
        for name, plan in named.items()
        for protocol in PROTOCOLS
    ]
    topology = next(iter(named.values())).topology
    return ModelFigures(
        trace=trace,
        counted_on=counted_on,
        is_held_out=bool(held_out),
        affinity=describe(trace),
        stability=describe_stability(trace, num_ranks=max(2, topology.num_ranks)),
        plans=named,
        arms=tuple(arms),
        runs=tuple(runs),
    )


def _name_plans(
    trace: RoutingTrace, plans: list[tuple[Path, PlacementPlan]]
) -> dict[str, PlacementPlan]:
    """Plans by strategy, or by file where two share one; linear first, made if it is not given."""
    if len({plan.topology for _, plan in plans}) > 1:
        shapes = sorted({f"{plan.num_ranks} ranks ({path})" for path, plan in plans})
        msg = f"plans for different machines cannot be compared: {'; '.join(shapes)}"
        raise ReportError(msg)
    topology = plans[0][1].topology if plans else Topology(num_nodes=1, ranks_per_node=4)
    named = {"linear": place_linear(trace, topology)}
    strategies = Counter(plan.strategy.name for _, plan in plans)
    for path, plan in plans:
        name = plan.strategy.name
        named[name if strategies[name] == 1 else path.stem] = plan
    return named


Item = TypeVar("Item", RoutingTrace, PlacementPlan, Run)


def _by_model(
    items: Iterable[tuple[Path, Item]], profiles: Mapping[str, RoutingTrace]
) -> dict[str, list[tuple[Path, Item]]]:
    """Items by the profile they belong to."""
    found: dict[str, list[tuple[Path, Item]]] = {key: [] for key in profiles}
    for path, item in items:
        if _key(item.model) not in found:
            known = ", ".join(trace.model for trace in profiles.values())
            msg = f"{path} is of {item.model}, profiled were: {known}; give its --trace too"
            raise ReportError(msg)
        found[_key(item.model)].append((path, item))
    return found


def _key(model: str) -> str:
    """Models are the same if their last names are, as for `ModelIdentity`."""
    return Path(model).name
