r"""What a plan costs: rows on the wire, per link, and token load. The one place that counts.

For token t at MoE layer l: S_l its chosen logical experts, R_l the ranks that run them, h_l its
owner. A rank that runs several of a token's experts receives the token's row once (rank dedup).

    protocol    dispatch rows    combine rows
    home        |R_l \ {h}|      |R_l \ {h}|
    coherent    |R_l \ {h_l}|    |R_l \ {h_(l+1)}|
    coherent, replicated    0    W (W - 1)

Where dispatch is replicated, every rank has every token at every layer; each sends its partial sum
to all others, whether it runs experts of the token or not. Copies of experts run as under `home`.

Tokens walk by the rules of `placement.rules`, which the runtime follows too. h_0 is a token's home,
or under `coherent` where `first_owner` says, if the trace foretells its first experts.

Shapes: T tokens, K experts a token, E experts, W ranks, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from placement.errors import UserError
from placement.rules import first_owner, relays, walk_layers
from placement.trace import COUNTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace

Dispatch = Literal["flat", "hierarchical", "replicated"]
DISPATCHES: tuple[Dispatch, ...] = ("flat", "hierarchical", "replicated")
Protocol = Literal["home", "coherent"]
PROTOCOLS: tuple[Protocol, ...] = ("home", "coherent")
CHUNK_CELLS = 1 << 22


class TrafficError(UserError):
    """A trace and a plan that do not belong together, or an unknown protocol."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """Rows and load of a plan on a trace.

    Attributes:
        num_tokens: tokens counted.
        dispatch: int64 (layers, ranks, ranks) rows by layer, source and destination.
        combine: int64 (layers, ranks, ranks) rows that return.
        inter_node: rows of both ways whose source and destination are on different nodes.
        inter_node_dedup: the same, each token sent once per remote node and fanned out inside.
        load: int64 (layers, ranks) routed (token, expert) pairs.
        rows_of_token: int32 (tokens,) rows of both ways over all layers.
        inter_node_rows_of_token: int32 (tokens,) the same for `inter_node_dedup`.
    """

    num_tokens: int
    dispatch: NDArray[np.int64]
    combine: NDArray[np.int64]
    inter_node: int
    inter_node_dedup: int
    load: NDArray[np.int64]
    rows_of_token: NDArray[np.int32]
    inter_node_rows_of_token: NDArray[np.int32]

    def rows_per_token(self) -> dict[str, float]:
        """Rows per token summed over layers, by kind."""
        rows = {
            "dispatch": int(self.dispatch.sum()),
            "combine": int(self.combine.sum()),
            "total": int(self.dispatch.sum() + self.combine.sum()),
            "inter_node": self.inter_node,
            "inter_node_dedup": self.inter_node_dedup,
        }
        return {name: count / self.num_tokens for name, count in rows.items()}

    def imbalance(self) -> dict[str, float]:
        """Max / mean load over ranks, as mean and max over layers."""
        return summarize_imbalance(self.load)


def imbalance_of(load: NDArray[Any]) -> NDArray[np.float64]:
    """(layers,) max / mean over the last axis of a (layers, ranks) load."""
    result: NDArray[np.float64] = load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-12)
    return result


def summarize_imbalance(load: NDArray[Any]) -> dict[str, float]:
    """Max / mean load over ranks, as mean and max over layers."""
    per_layer = imbalance_of(load)
    return {"mean": float(per_layer.mean()), "max": float(per_layer.max())}


def count_traffic(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    protocol: Protocol = "coherent",
    coherence_domain: int | None = None,
    homes: NDArray[Any] | None = None,
    dispatch: Dispatch = "flat",
) -> Traffic:
    """Count the rows that `plan` sends for the routing in `trace`.

    Args:
        trace: recorded routing.
        plan: a plan for the same model.
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None means all. Ignored under `home`.
        homes: (tokens,) home of the request each token is of; default `sequence_id % num_ranks`.
            Tokens start there, under `coherent` where `first_owner` says if the trace foretells it.
        dispatch: "flat", or "hierarchical": rows cross to a node once and are fanned out there,
            partial sums are added on their node first (`relays`), which changes the links that
            rows take, not how many there are; or "replicated".

    Raises:
        TrafficError: if trace and plan are of different models, the protocol is unknown, or
            dispatch is replicated and not all ranks are in one domain.
        TrafficError: if the trace carries loads only.
    """
    check_rows(trace, plan)
    size = _domain_size(protocol, coherence_domain)
    if dispatch == "replicated":
        if size not in (None, plan.num_ranks):
            msg = "dispatch can be replicated only under coherent with all ranks in one domain"
            raise TrafficError(msg)
        size = 1
    return _walk(trace, plan, size, homes=homes, dispatch=dispatch)


def count_load(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    protocol: Protocol = "coherent",
    coherence_domain: int | None = None,
) -> NDArray[np.int64]:
    """(layers, ranks) routed (token, expert) pairs, also of a trace that carries loads only.

    Raises:
        TrafficError: if trace and plan are of different models or the protocol is unknown.
    """
    _check_model(trace, plan)
    return _walk(trace, plan, _domain_size(protocol, coherence_domain)).load


def check_rows(trace: RoutingTrace, plan: PlacementPlan) -> None:
    """Refuse to count rows of a trace of another model, or of one that carries loads only.

    Raises:
        TrafficError: naming what differs.
        TrafficError: saying what to record instead.
    """
    _check_model(trace, plan)
    require_routing(trace, "counting rows")


def require_routing(trace: RoutingTrace, purpose: str) -> None:
    """Refuse a trace that carries loads only.

    Raises:
        TrafficError: saying what to record instead.
    """
    if trace.phase == COUNTS:
        msg = (
            f"{purpose} needs to see which experts a token uses together; this trace was made from "
            f"loads alone ({trace.source}), which serve only to balance load; record routed experts"
        )
        raise TrafficError(msg)


def _check_model(trace: RoutingTrace, plan: PlacementPlan) -> None:
    difference = trace.identity.difference(plan.identity, names=("the trace", "the plan"))
    if difference is not None:
        msg = f"{difference}; use a plan made from a trace of the same model"
        raise TrafficError(msg)


def _domain_size(protocol: Protocol, coherence_domain: int | None) -> int | None:
    if protocol not in PROTOCOLS:
        msg = f"unknown protocol {protocol!r}; choose home or coherent"
        raise TrafficError(msg)
    return 1 if protocol == "home" else coherence_domain


def _walk(
    trace: RoutingTrace,
    plan: PlacementPlan,
    domain_size: int | None,
    *,
    homes: NDArray[Any] | None = None,
    dispatch: Dispatch = "flat",
) -> Traffic:
    walk = _Walk(plan, plan.topology.domain_of_rank(domain_size), dispatch)
    home = trace.sequence_ids % plan.num_ranks if homes is None else homes
    step = max(1, CHUNK_CELLS // (plan.num_ranks * (trace.top_k + 4)))
    for start in range(0, trace.num_tokens, step):
        part = slice(start, start + step)
        walk.add(
            trace.expert_ids[part].astype(np.int64),
            home[part].astype(np.int64),
            None if trace.foretold_ids is None else trace.foretold_ids[part].astype(np.int64),
        )
    return walk.traffic()


class _Walk:
    """Counts gathered while chunks of tokens walk through the layers."""

    def __init__(
        self, plan: PlacementPlan, domain_of_rank: NDArray[np.int64], dispatch: Dispatch
    ) -> None:
        layers, width = plan.num_layers, plan.num_ranks
        self.hosts = plan.hosts().astype(np.int64)
        self.outlook = plan.outlook_table()
        self.node_of_rank = plan.topology.node_of_rank
        self.domain_of_rank = domain_of_rank
        self.is_hierarchical = dispatch == "hierarchical"
        self.is_replicated = dispatch == "replicated"
        self.dispatch = np.zeros((layers, width, width), dtype=np.int64)
        self.combine = np.zeros((layers, width, width), dtype=np.int64)
        self.load = np.zeros((layers, width), dtype=np.int64)
        self.inter_node = 0
        self.rows: list[NDArray[np.int32]] = []
        self.inter_node_rows: list[NDArray[np.int32]] = []

    def add(
        self,
        expert_ids: NDArray[np.int64],
        home: NDArray[np.int64],
        foretold_ids: NDArray[np.int64] | None,
    ) -> None:
        owner = first_owner(
            self.hosts[0], foretold_ids, home, self.node_of_rank, self.domain_of_rank
        )
        width = len(self.node_of_rank)
        rows = np.zeros(len(owner), dtype=np.int32)
        inter_node_rows = np.zeros(len(owner), dtype=np.int32)
        steps = walk_layers(
            expert_ids,
            owner,
            self.hosts,
            node_of_rank=self.node_of_rank,
            domain_of_rank=self.domain_of_rank,
            outlook=self.outlook,
        )
        for step in steps:
            self.load[step.layer] += np.bincount(step.rank_of_choice.ravel(), minlength=width)
            if self.is_replicated:
                from_each, to_nodes = self._count_all(len(owner), self.combine[step.layer])
                rows += from_each
                inter_node_rows += to_nodes
                continue
            runs = np.zeros((len(owner), width), dtype=np.bool_)
            np.put_along_axis(runs, step.rank_of_choice, values=True, axis=1)
            for end, matrix in ((step.owner, self.dispatch), (step.next_owner, self.combine)):
                remote, nodes = self._count(runs, end, matrix[step.layer])
                rows += remote
                inter_node_rows += nodes
        self.rows.append(rows)
        self.inter_node_rows.append(inter_node_rows)

    def _count_all(self, count: int, matrix: NDArray[np.int64]) -> tuple[int, int]:
        """Rows of tokens that every rank has, from each to each; rows and nodes of one token."""
        width = len(self.node_of_rank)
        matrix += count * (1 - np.eye(width, dtype=np.int64))
        between = int((self.node_of_rank[:, None] != self.node_of_rank).sum())
        self.inter_node += between * count
        return width * (width - 1), width * int(self.node_of_rank[-1])

    def _count(
        self, runs: NDArray[np.bool_], end: NDArray[np.int64], matrix: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows between `end` (the owner) and the ranks that run experts; rows and nodes a token."""
        width = len(self.node_of_rank)
        remote = runs.copy()
        remote[np.arange(len(end)), end] = False
        token, rank = np.nonzero(remote)
        peer = end[token]
        if self.is_hierarchical:
            relay = relays(runs, end, self.node_of_rank)[token, rank]
            peer = np.where(relay == rank, peer, relay)
        matrix += np.bincount(peer * width + rank, minlength=width * width).reshape(width, width)
        rows = np.bincount(token, minlength=len(end)).astype(np.int32)
        if self.node_of_rank[-1] == 0:
            return rows, np.zeros_like(rows)
        crosses = self.node_of_rank[end][:, None] != self.node_of_rank
        between = remote & crosses
        self.inter_node += int(between.sum())
        starts = np.flatnonzero(np.diff(self.node_of_rank, prepend=-1))
        nodes = np.logical_or.reduceat(between, starts, axis=1).sum(axis=1, dtype=np.int32)
        return rows, nodes

    def traffic(self) -> Traffic:
        rows, inter_node_rows = np.concatenate(self.rows), np.concatenate(self.inter_node_rows)
        return Traffic(
            num_tokens=len(rows),
            dispatch=self.dispatch,
            combine=self.combine.transpose(0, 2, 1).copy(),
            inter_node=self.inter_node,
            inter_node_dedup=int(inter_node_rows.sum()),
            load=self.load,
            rows_of_token=rows,
            inter_node_rows_of_token=inter_node_rows,
        )


def crossing_rate(trace: RoutingTrace, plan: PlacementPlan) -> float:
    """The paper's metric: the share of layer transitions of the top-1 path that leave the rank.

    With replicas a token runs the copy that `choose_ranks` picks when it moves as under top-1
    `coherent` from `sequence_id % num_ranks`. Source: arXiv 2401.08383, eq. 8.
    """
    check_rows(trace, plan)
    if trace.num_layers < 2:
        return 0.0
    steps = walk_layers(
        trace.expert_ids[:, :, :1].astype(np.int64),
        (trace.sequence_ids % plan.num_ranks).astype(np.int64),
        plan.hosts().astype(np.int64),
        node_of_rank=plan.topology.node_of_rank,
        domain_of_rank=plan.topology.domain_of_rank(),
    )
    path = np.stack([step.rank_of_choice[:, 0] for step in steps], axis=1)
    return float((path[:, 1:] != path[:, :-1]).mean())
