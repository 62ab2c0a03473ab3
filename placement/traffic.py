r"""What a plan costs: rows on the wire, per link, and token load. The one place that counts.

For token t at MoE layer l: S_l its chosen logical experts, R_l the ranks that run them, h_l its
owner. A rank that runs several of a token's experts receives the token's row once (rank dedup).

    protocol    dispatch rows    combine rows
    home        |R_l \ {h}|      |R_l \ {h}|
    coherent    |R_l \ {h_l}|    |R_l \ {h_(l+1)}|
    coherent, replicated    0    W (W - 1)

Where dispatch is replicated, every rank has every token at every layer; each sends its partial sum
to all others, whether it runs experts of the token or not. Copies of experts run as under `home`.

`choose_ranks` and `next_owner` are the rules the runtime follows too. They take NumPy arrays or
torch tensors: only operations that both libraries spell alike are used.

Shapes: T tokens, K experts a token, E experts, W ranks, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace

Dispatch = Literal["flat", "hierarchical", "replicated"]
DISPATCHES: tuple[Dispatch, ...] = ("flat", "hierarchical", "replicated")
Array: TypeAlias = Any  # a NumPy array or a torch tensor
Protocol = Literal["home", "coherent"]
PROTOCOLS: tuple[Protocol, ...] = ("home", "coherent")
CHUNK_CELLS = 1 << 22


class TrafficError(UserError):
    """A trace and a plan that do not belong together, or an unknown protocol."""


def choose_ranks(hosts: Array, expert_ids: Array, owner: Array, node_of_rank: Array) -> Array:
    """The rank that runs each chosen expert of each token.

    An expert with one copy runs there. Then, in order of gate weight, a replicated expert runs on
    the owner if it has a copy, else on a rank already chosen for the token, else on the owner's
    node, else on a node already visited; ties go to the first copy from rank (owner + expert)
    upwards, modulo the number of ranks, which spreads load.

    Args:
        hosts: int64 (E, W), 1 where the rank holds a copy.
        expert_ids: int64 (T, K), by falling gate weight.
        owner: int64 (T,).
        node_of_rank: int64 (W,).

    Returns:
        int64 (T, K) ranks.

    >>> hosts = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]])   # expert 1 is on ranks 1 and 2
    >>> choose_ranks(hosts, np.array([[1, 2]]), np.array([0]), np.zeros(3, int)).tolist()
    [[2, 2]]
    """
    num_ranks = hosts.shape[1]
    ranks = _range_like(owner, num_ranks)
    copies = hosts.sum(axis=1)
    chosen_rank = hosts.argmax(axis=1)[expert_ids]
    is_owner = owner[:, None] == ranks
    on_owner_node = node_of_rank[owner][:, None] == node_of_rank
    is_fixed = copies[expert_ids] == 1
    chosen = ((chosen_rank[:, :, None] == ranks) & is_fixed[:, :, None]).any(axis=1)
    visited = _on_same_node(chosen, node_of_rank)
    turn = num_ranks - (ranks - ranks[:, None]) % num_ranks
    near_owner = (is_owner * 8 + on_owner_node * 2) * (num_ranks + 1)
    for slot in range(expert_ids.shape[1]):
        experts = expert_ids[:, slot]
        nearness = near_owner + (chosen * 4 + visited * 1) * (num_ranks + 1)
        first = turn[(owner + experts) % num_ranks]
        best = (hosts[experts] * (nearness + first)).argmax(axis=1)
        chosen_rank[:, slot] = best
        chosen = chosen | (best[:, None] == ranks)
        visited = visited | (node_of_rank[best][:, None] == node_of_rank)
    return chosen_rank


def next_owner(
    rank_of_choice: Array, owner: Array, domain_of_rank: Array, outlook: Array | None = None
) -> Array:
    """The rank in the owner's coherence domain that runs most of the token's experts.

    With an outlook: of the ranks that run any of its experts, the one where the next layer costs
    least. All of them save one combine row; what they save at the next layer differs.
    Ties go to the present owner, then to the lowest rank; a token with no expert in its domain
    stays where it is.

    Args:
        rank_of_choice: int64 (T, K) from `choose_ranks`.
        owner: int64 (T,).
        domain_of_rank: int64 (W,).
        outlook: int64 (T, W) the plan's outlook, summed over the token's experts; None: without.

    Returns:
        int64 (T,).

    >>> next_owner(np.array([[2, 1, 2], [0, 1, 2]]), np.array([0, 1]), np.zeros(3, int)).tolist()
    [2, 1]
    """
    num_ranks = domain_of_rank.shape[0]
    ranks = _range_like(owner, num_ranks)
    experts_run = (rank_of_choice[:, :, None] == ranks).sum(axis=1)
    is_owner = (owner[:, None] == ranks) * 1
    in_domain = domain_of_rank[owner][:, None] == domain_of_rank
    if outlook is not None:
        may_own = in_domain * (experts_run > 0)
        preference = (outlook * 2 + is_owner) * num_ranks + (num_ranks - 1 - ranks)
        return (may_own * (preference + 2 * num_ranks) + is_owner).argmax(axis=1)
    preference = experts_run * 2 + is_owner
    return (in_domain * (preference * num_ranks + (num_ranks - 1 - ranks) + 1)).argmax(axis=1)


def relays(runs: Array, end: Array, node_of_rank: Array) -> Array:
    """Which rank a row between `end` and each rank passes, where dispatch is hierarchical.

    On another node than `end`'s it is the one rank there that talks with `end` for the token: of
    those that run its experts the first from `end`'s place in its node upwards, modulo the ranks
    of a node, which spreads the work. On `end`'s own node it is the rank itself. So a token
    crosses to a node once, by a rank that needs it anyway, and there are as many rows as in flat
    dispatch.

    Args:
        runs: bool (T, W), whether a rank runs any of the token's experts.
        end: int64 (T,) the owner, or for partial sums the next owner.
        node_of_rank: int64 (W,).

    Returns:
        int64 (T, W); it means something where `runs` is true.

    >>> runs = np.array([[False, True, True, True]])
    >>> relays(runs, np.array([1]), np.array([0, 0, 1, 1])).tolist()[0][1:]
    [1, 3, 3]
    """
    num_ranks = node_of_rank.shape[0]
    ranks = _range_like(end, num_ranks)
    per_node = int((node_of_rank == node_of_rank[0]).sum())
    turn = per_node - (ranks - end[:, None]) % per_node
    shape = (end.shape[0], num_ranks // per_node, per_node)
    first = (runs * turn).reshape(shape).argmax(axis=2)[:, node_of_rank]
    is_near = (node_of_rank[end][:, None] == node_of_rank) * 1
    return is_near * ranks + (1 - is_near) * (node_of_rank * per_node + first)


def _range_like(array: Array, stop: int) -> Array:
    if isinstance(array, np.ndarray):
        return np.arange(stop)
    return array.new_ones(stop).cumsum(0) - 1


def _on_same_node(chosen: Array, node_of_rank: Array) -> Array:
    """(T, W) whether a chosen rank shares the node of each rank."""
    same_node = node_of_rank[:, None] == node_of_rank
    return (chosen * 1.0) @ (same_node * 1.0) > 0


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
        per_layer = imbalance_of(self.load)
        return {"mean": float(per_layer.mean()), "max": float(per_layer.max())}


def imbalance_of(load: NDArray[Any]) -> NDArray[np.float64]:
    """(layers,) max / mean over the last axis of a (layers, ranks) load."""
    result: NDArray[np.float64] = load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-12)
    return result


def count_traffic(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    protocol: Protocol = "coherent",
    coherence_domain: int | None = None,
    first_owner: NDArray[Any] | None = None,
    dispatch: Dispatch = "flat",
) -> Traffic:
    """Count the rows that `plan` sends for the routing in `trace`.

    Args:
        trace: recorded routing.
        plan: a plan for the same model.
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None means all. Ignored under `home`.
        first_owner: (tokens,) owner at the first layer; default `sequence_id % num_ranks`.
        dispatch: "flat", or "hierarchical": rows cross to a node once and are fanned out there,
            partial sums are added on their node first (`relays`), which changes the links that
            rows take, not how many there are; or "replicated".

    Raises:
        TrafficError: if trace and plan differ in layers or experts, the protocol is unknown, or
            dispatch is replicated and not all ranks are in one domain.
    """
    _check(trace, plan, protocol)
    size = 1 if protocol == "home" else coherence_domain
    if dispatch == "replicated":
        if size not in (None, plan.num_ranks):
            msg = "dispatch can be replicated only under coherent with all ranks in one domain"
            raise TrafficError(msg)
        size = 1
    walk = _Walk(plan, plan.topology.domain_of_rank(size), dispatch)
    owner = trace.sequence_ids % plan.num_ranks if first_owner is None else first_owner
    step = max(1, CHUNK_CELLS // (plan.num_ranks * (trace.top_k + 4)))
    for start in range(0, trace.num_tokens, step):
        part = slice(start, start + step)
        walk.add(trace.expert_ids[part].astype(np.int64), owner[part].astype(np.int64))
    return walk.traffic()


def _check(trace: RoutingTrace, plan: PlacementPlan, protocol: str) -> None:
    if protocol not in PROTOCOLS:
        msg = f"unknown protocol {protocol!r}; choose home or coherent"
        raise TrafficError(msg)
    if trace.num_experts != plan.num_experts or trace.layer_ids != plan.layer_ids:
        msg = (
            f"the trace is of {trace.model} ({trace.num_layers} layers, {trace.num_experts} "
            f"experts), the plan for {plan.model} ({plan.num_layers} layers, {plan.num_experts} "
            f"experts); use a plan made from a trace of the same model"
        )
        raise TrafficError(msg)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One layer of a walk: where tokens stood, where their experts ran, where they went."""

    layer: int
    owner: NDArray[np.int64]
    rank_of_choice: NDArray[np.int64]
    next_owner: NDArray[np.int64]


def walk_layers(
    expert_ids: NDArray[np.int64],
    owner: NDArray[np.int64],
    hosts: NDArray[np.int64],
    *,
    node_of_rank: NDArray[np.int64],
    domain_of_rank: NDArray[np.int64],
    outlook: NDArray[np.int64] | None = None,
) -> Iterator[Step]:
    """Follow tokens through all layers.

    Args:
        expert_ids: (T, L, K).
        owner: (T,) owner at the first layer.
        hosts: (L, E, W), 1 where the rank holds a copy.
        node_of_rank: (W,).
        domain_of_rank: (W,); every rank its own domain is `home`.
        outlook: (L, E, W) of the plan, if it has one.
    """
    for layer, table in enumerate(hosts):
        experts = expert_ids[:, layer]
        if int(table.sum()) == len(table):
            ranks = table.argmax(axis=1)[experts]
        else:
            ranks = choose_ranks(table, experts, owner, node_of_rank)
        ahead = None if outlook is None else outlook[layer][experts].sum(axis=1)
        moved = next_owner(ranks, owner, domain_of_rank, ahead)
        yield Step(layer=layer, owner=owner, rank_of_choice=ranks, next_owner=moved)
        owner = moved


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

    def add(self, expert_ids: NDArray[np.int64], owner: NDArray[np.int64]) -> None:
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
    _check(trace, plan, "coherent")
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
