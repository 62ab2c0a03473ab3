"""PlacementPlan: which logical experts each rank holds, layer by layer (`exflow.plan/1`, JSON)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.errors import UserError
from placement.identity import ModelIdentity
from placement.json_text import parse_json
from placement.output import replacing
from placement.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FORMAT = "exflow.plan/1"
OUTLOOK_STOP = 1 << 16
Slots = tuple[tuple[tuple[int, ...], ...], ...]
Outlook = tuple[tuple[tuple[int, ...], ...], ...]


class PlanError(UserError):
    """A placement plan that is malformed or made for something else."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a plan was made: the strategy's name, its seed and its options."""

    name: str
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """The experts of every rank at every MoE layer.

    Attributes:
        model: the model's name.
        num_experts: logical experts per layer.
        layer_ids: the model's own index of each MoE layer.
        topology: the ranks the plan is for.
        strategy: how it was made.
        slots: slots[layer][rank] lists the logical experts on that rank; an expert on two ranks
            is a replica; ranks may hold different numbers.
        predicted: figures the planner expects (rows per token, imbalance).
        bound: what no plan can beat for the same statistics.
        outlook: outlook[layer][expert][rank], whole numbers from 0: how few rows the next layer
            costs a token with this expert that this rank owns. The owner rule of
            `placement.traffic` follows it; empty: the rule does without.
    """

    model: str
    num_experts: int
    layer_ids: tuple[int, ...]
    topology: Topology
    strategy: Strategy
    slots: Slots
    predicted: Mapping[str, Any] = field(default_factory=dict)
    bound: Mapping[str, Any] = field(default_factory=dict)
    outlook: Outlook = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_ids", tuple(map(int, self.layer_ids)))
        if not self.layer_ids or len(self.slots) != len(self.layer_ids):
            msg = f"the plan names {len(self.layer_ids)} layers and places {len(self.slots)}"
            raise PlanError(msg)
        if self.num_experts < 1:
            msg = f"num_experts must be at least 1, got {self.num_experts}"
            raise PlanError(msg)
        for layer, ranks in zip(self.layer_ids, self.slots, strict=True):
            self._check_layer(layer, ranks)
        self._check_outlook()

    def _check_outlook(self) -> None:
        shape = (len(self.layer_ids), self.num_experts, self.topology.num_ranks)
        if not self.outlook:
            return
        if len(self.outlook) != shape[0] or any(
            len(layer) != shape[1] or any(len(row) != shape[2] for row in layer)
            for layer in self.outlook
        ):
            msg = f"outlook must hold {shape[0]} layers of {shape[1]} experts by {shape[2]} ranks"
            raise PlanError(msg)
        if not all(0 <= x < OUTLOOK_STOP for layer in self.outlook for row in layer for x in row):
            msg = f"outlook must hold whole numbers from 0 to {OUTLOOK_STOP - 1}"
            raise PlanError(msg)

    def _check_layer(self, layer: int, ranks: tuple[tuple[int, ...], ...]) -> None:
        if len(ranks) != self.topology.num_ranks:
            msg = f"layer {layer} lists {len(ranks)} ranks, expected {self.topology.num_ranks}"
            raise PlanError(msg)
        for rank, experts in enumerate(ranks):
            if len(set(experts)) != len(experts):
                msg = f"layer {layer}, rank {rank} lists an expert twice: {list(experts)}"
                raise PlanError(msg)
        placed = {expert for experts in ranks for expert in experts}
        unknown = sorted(expert for expert in placed if not 0 <= expert < self.num_experts)
        if unknown:
            msg = f"layer {layer} places unknown experts {unknown[:8]} of {self.num_experts}"
            raise PlanError(msg)
        missing = list(islice((e for e in range(self.num_experts) if e not in placed), 8))
        if missing:
            msg = f"layer {layer} places no copy of experts {missing}"
            raise PlanError(msg)

    @property
    def identity(self) -> ModelIdentity:
        """The model it is for."""
        return ModelIdentity(
            model=self.model, num_experts=self.num_experts, layer_ids=self.layer_ids
        )

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.layer_ids)

    @property
    def num_ranks(self) -> int:
        """Ranks of the topology."""
        return self.topology.num_ranks

    @property
    def num_slots(self) -> int:
        """Physical experts, over all layers and ranks."""
        return sum(len(experts) for ranks in self.slots for experts in ranks)

    @property
    def has_replicas(self) -> bool:
        """Whether any expert has a second copy."""
        return self.num_slots > self.num_layers * self.num_experts

    def hosts(self) -> NDArray[np.bool_]:
        """(layers, experts, ranks) whether a rank holds a copy of an expert."""
        hosts = np.zeros((self.num_layers, self.num_experts, self.num_ranks), dtype=np.bool_)
        for layer, ranks in enumerate(self.slots):
            for rank, experts in enumerate(ranks):
                hosts[layer, list(experts), rank] = True
        return hosts

    def outlook_table(self) -> NDArray[np.int64] | None:
        """(layers, experts, ranks) `outlook`, None where there is none."""
        return np.array(self.outlook, dtype=np.int64) if self.outlook else None

    def check_for(
        self, *, model: str, num_experts: int, layer_ids: tuple[int, ...], num_ranks: int
    ) -> None:
        """Refuse to serve what the plan was not made for.

        Raises:
            PlanError: naming what the plan is for, what came, and what to do.
        """
        served = ModelIdentity(model=model, num_experts=num_experts, layer_ids=layer_ids)
        difference = self.identity.difference(served, names=("the plan", "this model"))
        if difference is not None:
            msg = (
                f"the plan was made for {self.model} ({len(self.layer_ids)} MoE layers of "
                f"{self.num_experts} experts), this model is {model}: {difference}; place a trace "
                f"of this model: `exflow profile`, then `exflow place`"
            )
            raise PlanError(msg)
        if self.num_ranks != num_ranks:
            msg = (
                f"the plan is for {self.num_ranks} ranks, this job has {num_ranks}; "
                f"run `exflow place` with --nodes and --ranks-per-node for {num_ranks} ranks"
            )
            raise PlanError(msg)

    @classmethod
    def from_hosts(
        cls,
        hosts: NDArray[np.bool_],
        *,
        model: str,
        layer_ids: tuple[int, ...],
        topology: Topology,
        strategy: Strategy,
    ) -> PlacementPlan:
        """A plan from (layers, experts, ranks) flags, experts in rising order on each rank."""
        slots = tuple(
            tuple(tuple(int(e) for e in np.flatnonzero(on_rank)) for on_rank in layer.T)
            for layer in hosts
        )
        return cls(
            model=model,
            num_experts=hosts.shape[1],
            layer_ids=layer_ids,
            topology=topology,
            strategy=strategy,
            slots=slots,
        )

    @classmethod
    def from_rank_of_expert(
        cls,
        rank_of_expert: NDArray[Any],
        *,
        model: str,
        layer_ids: tuple[int, ...],
        topology: Topology,
        strategy: Strategy,
    ) -> PlacementPlan:
        """A plan without replicas from (layers, experts) ranks."""
        hosts = rank_of_expert[:, :, None] == np.arange(topology.num_ranks)
        return cls.from_hosts(
            hosts, model=model, layer_ids=layer_ids, topology=topology, strategy=strategy
        )

    def save(self, path: str | Path) -> None:
        """Write `exflow.plan/1`: the same plan is the same bytes.

        Raises:
            OutputError: if it cannot be written.
        """
        with replacing(Path(path)) as partial:
            partial.write_text(_to_json(self), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PlacementPlan:
        """Read `exflow.plan/1`.

        Raises:
            PlanError: naming the file and what is wrong with it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            msg = f"{path}: no such plan; make one with `exflow place TRACE -o {path}`"
            raise PlanError(msg) from error
        except (OSError, UnicodeDecodeError) as error:
            msg = f"{path}: cannot be read as a plan: {error}"
            raise PlanError(msg) from error
        try:
            return _from_json(parse_json(text))
        except UserError as error:
            msg = f"{path}: not a usable placement plan: {error}"
            raise PlanError(msg) from error


def _to_json(plan: PlacementPlan) -> str:
    head = {
        "format": FORMAT,
        "model": plan.model,
        "num_experts": plan.num_experts,
        "layer_ids": list(plan.layer_ids),
        "topology": {
            "num_nodes": plan.topology.num_nodes,
            "ranks_per_node": plan.topology.ranks_per_node,
        },
        "strategy": {
            "name": plan.strategy.name,
            "seed": plan.strategy.seed,
            "options": dict(plan.strategy.options),
        },
    }
    tail = {"predicted": dict(plan.predicted), "bound": dict(plan.bound)}
    layers = ",\n  ".join(json.dumps(layer) for layer in plan.slots)
    start, end = json.dumps(head)[:-1], json.dumps(tail)[1:]
    outlook = ",\n  ".join(json.dumps(layer, separators=(",", ":")) for layer in plan.outlook)
    outlook = f'"outlook": [\n  {outlook}],\n ' if outlook else ""
    return f'{start},\n "slots": [\n  {layers}],\n {outlook}{end}\n'


def _from_json(data: object) -> PlacementPlan:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        msg = f"format is {found!r}, expected {FORMAT!r}"
        raise PlanError(msg)
    try:
        slots = tuple(
            tuple(tuple(_whole("slots", e) for e in experts) for experts in ranks)
            for ranks in data["slots"]
        )
        topology, strategy = data["topology"], data.get("strategy") or {"name": "unknown"}
        return PlacementPlan(
            model=str(data["model"]),
            num_experts=_whole("num_experts", data["num_experts"]),
            layer_ids=tuple(_whole("layer_ids", layer) for layer in data["layer_ids"]),
            topology=Topology(
                num_nodes=_whole("num_nodes", topology["num_nodes"]),
                ranks_per_node=_whole("ranks_per_node", topology["ranks_per_node"]),
            ),
            strategy=Strategy(
                name=str(strategy["name"]),
                seed=_whole("seed", strategy.get("seed", 0)),
                options=_object("options", strategy.get("options", {})),
            ),
            slots=slots,
            predicted=_object("predicted", data.get("predicted", {})),
            bound=_object("bound", data.get("bound", {})),
            outlook=tuple(
                tuple(tuple(_whole("outlook", x) for x in row) for row in layer)
                for layer in data.get("outlook", ())
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"a field is missing or has the wrong type: {error}"
        raise PlanError(msg) from error


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{name} must hold whole numbers, got {value!r:.40}"
        raise PlanError(msg)
    return value


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        msg = f"{name} must be a JSON object, got {value!r:.40}"
        raise PlanError(msg)
    return value
