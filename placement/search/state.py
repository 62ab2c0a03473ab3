"""What a search works on, as plain arrays that compiled loops can take.

Shapes: T tokens, L layers, K experts a token, E experts, W ranks, S slots a rank, C copies at most.
Everything is layer-major, so that a loop over the tokens of one layer stays in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.search.jit import Array, Number, kernel
from placement.search.walk import UNITS, route_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace

EMPTY = -1


class Tokens(NamedTuple):
    """Tokens in random order, and the tokens of every expert.

    Attributes:
        expert_ids: int16 (L, T, K).
        home: int16 (T,).
        foretold_ids: int16 (1, T, K) the experts that settle where a token starts (see
            `rules.first_owner`); (0, T, K) if tokens start at home.
        weight: float32 (T,) what a token counts for.
        part: int16 (T,) the part of the sequences a token belongs to; -1 where load is not counted
            by parts.
        start: int64 (L, E + 1) where an expert's tokens begin in `users`.
        users: int32 (L, U) tokens by expert, rising; at the first layer also those it is foretold
            for. U is T * K, or twice as many.
    """

    expert_ids: NDArray[np.int16]
    home: NDArray[np.int16]
    foretold_ids: NDArray[np.int16]
    weight: NDArray[np.float32]
    part: NDArray[np.int16]
    start: NDArray[np.int64]
    users: NDArray[np.int32]


class Machine(NamedTuple):
    """The ranks, and what a row costs.

    Attributes:
        node_of_rank: int64 (W,).
        domain_of_rank: int64 (W,).
        ranks_of_node: uint64 (nodes,) bits of a node's ranks.
        row_cost: float64 (2,) cost of a row between ranks, and what more it costs between nodes.
        unit: int64 (1,) what a row is sent for, an index into `UNITS`.
        outlook: int32 (L, E, W) of the plan (see `PlacementPlan.outlook`), empty without.
    """

    node_of_rank: NDArray[np.int64]
    domain_of_rank: NDArray[np.int64]
    ranks_of_node: NDArray[np.uint64]
    row_cost: NDArray[np.float64]
    unit: NDArray[np.int64]
    outlook: NDArray[np.int32]


class Layout(NamedTuple):
    """Where experts are.

    Attributes:
        slots: int16 (L, W, S) expert in a slot, or EMPTY.
        hosts: uint64 (L, E) bits of the ranks with a copy.
    """

    slots: NDArray[np.int16]
    hosts: NDArray[np.uint64]


class Flow(NamedTuple):
    """How the tokens travel under a layout.

    Attributes:
        owner: int16 (L + 1, T).
        choice: int16 (L, T, K) rank that runs each expert.
        cost: float32 (L, T) cost of a token at a layer.
        load: float64 (L, W) token load.
        part_load: float64 (L, P, W) the same by part; P is 0 without parts.
    """

    owner: NDArray[np.int16]
    choice: NDArray[np.int16]
    cost: NDArray[np.float32]
    load: NDArray[np.float64]
    part_load: NDArray[np.float64]


class Limits(NamedTuple):
    """What a layout must keep to.

    Attributes:
        rank_load: float64 (L,) cap on the token load of a rank.
        node_load: float64 (L,) cap on the token load of a node.
        even_load: float64 (L,) token load of a rank from which on load has a price.
        even_part: float64 (L, P) the same for the load of a part, which then has the price.
        price: float64 (2,) price of load above `even_load`, and of load above a cap.
        origin: uint64 (L, E) bits of the ranks with a copy before the search.
        replicas: int64 (1,) 1 if experts may have several copies.
        spread: int64 (1,) 1 if copies of an expert must be on different nodes.
        budget: int64 (1,) copies that may be somewhere new.
    """

    rank_load: NDArray[np.float64]
    node_load: NDArray[np.float64]
    even_load: NDArray[np.float64]
    even_part: NDArray[np.float64]
    price: NDArray[np.float64]
    origin: NDArray[np.uint64]
    replicas: NDArray[np.int64]
    spread: NDArray[np.int64]
    budget: NDArray[np.int64]


class Scratch(NamedTuple):
    """Room that the loops write to.

    Attributes:
        load: float64 (L, W) change of load.
        part_load: float64 (L, P, W) by part.
        last: int64 (1,) the last layer touched.
        moved: int64 (1,) copies where none was before the search.
        choice: int64 (K,) ranks of one token.
        rng: uint64 (1,) state of the generator.
    """

    load: NDArray[np.float64]
    part_load: NDArray[np.float64]
    last: NDArray[np.int64]
    moved: NDArray[np.int64]
    choice: NDArray[np.int64]
    rng: NDArray[np.uint64]


class Problem(NamedTuple):
    """All that a search works on."""

    tokens: Tokens
    machine: Machine
    layout: Layout
    flow: Flow
    limits: Limits
    scratch: Scratch


def make_scratch(flow: Flow, *, seed: int) -> Scratch:
    """Empty room for a search on `flow`."""
    return Scratch(
        load=np.zeros_like(flow.load),
        part_load=np.zeros_like(flow.part_load),
        last=np.zeros(1, dtype=np.int64),
        moved=np.zeros(1, dtype=np.int64),
        choice=np.zeros(flow.choice.shape[2], dtype=np.int64),
        rng=np.random.default_rng(seed).integers(1, 2**63, size=1, dtype=np.uint64),
    )


def make_tokens(
    trace: RoutingTrace,
    *,
    num_ranks: int,
    seed: int,
    weight: NDArray[np.float32] | None = None,
    parts: int = 0,
) -> Tokens:
    """The tokens of a trace in random order: the first n of any list are a fair sample of it.

    Args:
        trace: the tokens.
        num_ranks: W.
        seed: of the order.
        weight: what each token counts for.
        parts: parts to make of the sequences, at random, as many in each.
    """
    order = token_order(trace, seed=seed)
    ids = np.ascontiguousarray(trace.expert_ids[order].transpose(1, 0, 2).astype(np.int16))
    foretold = np.empty((0, *ids.shape[1:]), dtype=np.int16)
    if trace.foretold_ids is not None:
        foretold = np.ascontiguousarray(trace.foretold_ids[order][None].astype(np.int16))
    start, users = _users(ids, foretold, trace.num_experts)
    weights = np.ones(trace.num_tokens, dtype=np.float32) if weight is None else weight[order]
    return Tokens(
        expert_ids=ids,
        home=(trace.sequence_ids[order] % num_ranks).astype(np.int16),
        foretold_ids=foretold,
        weight=weights.astype(np.float32),
        part=_parts(trace, parts, seed=seed)[order],
        start=start,
        users=users,
    )


def first_tokens(tokens: Tokens, count: int, num_experts: int) -> Tokens:
    """The first tokens alone: a random sample."""
    ids = np.ascontiguousarray(tokens.expert_ids[:, :count])
    foretold = np.ascontiguousarray(tokens.foretold_ids[:, :count])
    start, users = _users(ids, foretold, num_experts)
    return Tokens(
        expert_ids=ids,
        home=tokens.home[:count],
        foretold_ids=foretold,
        weight=tokens.weight[:count],
        part=tokens.part[:count],
        start=start,
        users=users,
    )


def _parts(trace: RoutingTrace, parts: int, *, seed: int) -> NDArray[np.int16]:
    """(T,) the part of each token's sequence."""
    if parts == 0:
        return np.full(trace.num_tokens, -1, dtype=np.int16)
    sequences, index = np.unique(trace.sequence_ids, return_inverse=True)
    part_of = np.random.default_rng(seed).permutation(len(sequences)) % parts
    return part_of[index].astype(np.int16)


def token_order(trace: RoutingTrace, *, seed: int) -> NDArray[np.int64]:
    """The order in which a search sees a trace's tokens."""
    return np.random.default_rng(seed).permutation(trace.num_tokens)


def _users(
    ids: NDArray[np.int16], foretold_ids: NDArray[np.int16], num_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    layers, tokens, top_k = ids.shape
    start = np.zeros((layers, num_experts + 1), dtype=np.int64)
    users = np.zeros((layers, tokens * top_k * (1 + len(foretold_ids))), dtype=np.int32)
    list_users(ids, foretold_ids, start, users)
    return start, users


@kernel
def list_users(ids: Array, foretold_ids: Array, start: Array, users: Array) -> None:
    """Fills the tokens of each expert in their order, and where each list starts.

    The first layer's are those of the foretold experts, too. Both outputs start at zero.
    """
    layers, tokens, top_k = ids.shape
    for layer in range(layers):
        choices = top_k * (1 + (len(foretold_ids) if layer == 0 else 0))
        for token in range(tokens):
            for k in range(choices):
                if is_first(ids, foretold_ids, layer, token, k):
                    start[layer, expert_of(ids, foretold_ids, layer, token, k) + 1] += 1
        for expert in range(start.shape[1] - 1):
            start[layer, expert + 1] += start[layer, expert]
        for token in range(tokens):
            for k in range(choices):
                if is_first(ids, foretold_ids, layer, token, k):
                    expert = expert_of(ids, foretold_ids, layer, token, k)
                    users[layer, start[layer, expert]] = token
                    start[layer, expert] += 1
        for expert in range(start.shape[1] - 1, 0, -1):  # each has come to where the next starts
            start[layer, expert] = start[layer, expert - 1]
        start[layer, 0] = 0


@kernel
def is_first(ids: Array, foretold_ids: Array, layer: int, token: int, k: int) -> bool:
    """Whether no choice before the k-th is of the same expert."""
    expert = expert_of(ids, foretold_ids, layer, token, k)
    is_new = True
    for j in range(k):
        is_new = is_new and expert_of(ids, foretold_ids, layer, token, j) != expert
    return is_new


@kernel
def expert_of(ids: Array, foretold_ids: Array, layer: int, token: int, k: int) -> Number:
    """The k-th expert of a token at a layer, the foretold ones after its own."""
    top_k = ids.shape[2]
    return ids[layer, token, k] if k < top_k else foretold_ids[0, token, k - top_k]


def make_layout(hosts: NDArray[np.bool_], *, slots_per_rank: int) -> Layout:
    """The layout of (L, E, W) flags."""
    layers, _experts, width = hosts.shape
    slots = np.full((layers, width, slots_per_rank), EMPTY, dtype=np.int16)
    for layer, rank in np.ndindex(layers, width):
        held = np.flatnonzero(hosts[layer, :, rank])
        slots[layer, rank, : len(held)] = held
    return Layout(slots=slots, hosts=host_words(hosts))


def copied(layout: Layout) -> Layout:
    """A layout of its own."""
    return Layout(slots=layout.slots.copy(), hosts=layout.hosts.copy())


def host_words(hosts: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(L, E) the bits of the ranks with a copy, of (L, E, W) flags."""
    bits = np.uint64(1) << np.arange(hosts.shape[2], dtype=np.uint64)
    words: NDArray[np.uint64] = (hosts * bits).sum(axis=2, dtype=np.uint64)
    return words


def hosts_of(layout: Layout, num_experts: int) -> NDArray[np.bool_]:
    """(L, E, W) flags of a layout."""
    layers, width, _ = layout.slots.shape
    hosts = np.zeros((layers, num_experts + 1, width), dtype=np.bool_)
    layer, rank = np.ogrid[:layers, :width]
    for slot in range(layout.slots.shape[2]):
        hosts[layer, layout.slots[:, :, slot], rank] = True
    return hosts[:, :num_experts]


def make_machine(
    topology: Topology, *, domain: int | None, intra: float, inter: float, unit: str = "node"
) -> Machine:
    """The ranks and prices: `intra` a row inside a node, `inter` a row between nodes.

    Args:
        topology: ranks and nodes.
        domain: ranks in a coherence domain; None: all.
        intra: cost.
        inter: cost.
        unit: one of `UNITS`; "node": only the first row into a node costs `inter`.
    """
    return Machine(
        node_of_rank=topology.node_of_rank,
        domain_of_rank=topology.domain_of_rank(domain),
        ranks_of_node=_node_bits(topology),
        row_cost=np.array([intra, inter - intra], dtype=np.float64),
        unit=np.array([UNITS.index(unit)], dtype=np.int64),
        outlook=np.zeros((0, 0, 0), dtype=np.int32),
    )


def _node_bits(topology: Topology) -> NDArray[np.uint64]:
    bits = np.uint64(1) << np.arange(topology.num_ranks, dtype=np.uint64)
    by_node = bits.reshape(topology.num_nodes, topology.ranks_per_node)
    ranks: NDArray[np.uint64] = np.bitwise_or.reduce(by_node, axis=1)
    return ranks


def make_flow(tokens: Tokens, machine: Machine, layout: Layout) -> Flow:
    """Walks all tokens through all layers."""
    layers, count, top_k = tokens.expert_ids.shape
    width, parts = len(machine.node_of_rank), int(tokens.part.max(initial=-1)) + 1
    flow = Flow(
        owner=np.zeros((layers + 1, count), dtype=np.int16),
        choice=np.zeros((layers, count, top_k), dtype=np.int16),
        cost=np.zeros((layers, count), dtype=np.float32),
        load=np.zeros((layers, width), dtype=np.float64),
        part_load=np.zeros((layers, parts, width), dtype=np.float64),
    )
    route_all(tokens, machine, layout, flow, np.zeros(top_k, dtype=np.int64))
    return flow
