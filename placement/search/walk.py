"""Compiled: one token's way through one layer, by the rules of `placement.rules`.

Sets of ranks and of nodes are the bits of a 64-bit word, so a machine has at most 64 ranks here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.search.jit import Array, Number, Word, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.search.state import Flow, Layout, Machine, Tokens

MAX_RANKS = 64
ONE = np.uint64(1)
UNITS = ("node", "rank", "expert")  # of placement.timing
EACH_RANK, EACH_EXPERT = 1, 2


@kernel
def count_bits(word: Word) -> Number:
    """Bits set in a word."""
    word = word - ((word >> ONE) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    word = (word & pairs) + ((word >> np.uint64(2)) & pairs)
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def lowest_bit(word: Word) -> Number:
    """Index of the lowest bit set."""
    return count_bits((word & (~word + ONE)) - ONE)


@kernel
def has_bit(word: Word, index: Number) -> Number:
    """1 if a bit is set, else 0."""
    return np.int64((word >> np.uint64(index)) & ONE)


@kernel
def preferred(hosts: Word, wanted: Word) -> Word:
    """The ranks of `hosts` that are wanted, or all of them if none is."""
    both = hosts & wanted
    return both if both else hosts


@kernel
def nearest_copy(
    hosts: Word, owner: Number, chosen: Word, turn: Number, node_mask: Word, visited: Word
) -> Number:
    """The copy of an expert that `choose_ranks` takes.

    Args:
        hosts: ranks with a copy.
        owner: the token's owner.
        chosen: ranks chosen so far for the token.
        turn: (owner + expert) modulo the ranks, where the search for the first copy starts.
        node_mask: ranks of the owner's node.
        visited: ranks of the nodes visited so far.
    """
    hosts = preferred(preferred(preferred(hosts, chosen), node_mask), visited)
    return lowest_bit(preferred(hosts, ~((ONE << np.uint64(turn)) - ONE)))


@kernel
def choose_copies(
    layer: int, token: int, owner: Number, ids: Array, hosts: Array, machine: Machine, choice: Array
) -> Word:
    """Fills `choice` (K,) with the rank of each expert (see `choose_ranks`); returns them as a set.

    Written with few branches: what a token does is hard to predict.
    """
    top_k, node_of_rank = ids.shape[2], machine.node_of_rank
    chosen: Word = np.uint64(0)
    visited: Word = np.uint64(0)
    still_open: Word = np.uint64(0)
    for k in range(top_k):
        copies = hosts[layer, ids[layer, token, k]]
        is_open = (copies & (copies - ONE)) != 0
        still_open |= np.uint64(is_open) << np.uint64(k)
        rank = lowest_bit(copies)
        choice[k] = rank
        chosen |= np.uint64(0) if is_open else copies
        visited |= np.uint64(0) if is_open else machine.ranks_of_node[node_of_rank[rank]]
    own_bit = ONE << np.uint64(owner)
    own_node = machine.ranks_of_node[node_of_rank[owner]]
    while still_open:
        k = lowest_bit(still_open)
        still_open &= still_open - ONE
        expert = ids[layer, token, k]
        turn = np.uint32(owner + expert) % np.uint32(len(node_of_rank))
        copies = preferred(hosts[layer, expert], own_bit)
        rank = nearest_copy(copies, owner, chosen, turn, own_node, visited)
        choice[k] = rank
        chosen |= ONE << np.uint64(rank)
        visited |= machine.ranks_of_node[node_of_rank[rank]]
    return chosen


@kernel
def visit(
    layer: int, token: int, owner: Number, ids: Array, hosts: Array, machine: Machine, choice: Array
) -> tuple[Number, Number]:
    """Routes one token at one layer: fills `choice` (K,) with the rank of each expert.

    Returns the next owner (see `next_owner`) and what the token's rows cost.
    """
    chosen = choose_copies(layer, token, owner, ids, hosts, machine, choice)
    looks_ahead = machine.outlook.shape[0] > 0
    best = best_owner(layer, token, owner, ids, machine, choice, looks_ahead)
    return best, cost_of(chosen, owner, best, machine, choice)


@kernel
def cost_of(chosen: Word, owner: Number, best: Number, machine: Machine, choice: Array) -> Number:
    """What a token's rows cost from its owner to the chosen ranks and on to its next owner."""
    if machine.unit[0] == EACH_EXPERT:
        return cost_by_expert(machine, choice, owner) + cost_by_expert(machine, choice, best)
    node_of_rank = machine.node_of_rank
    cost = machine.row_cost[0] * rows_between(chosen, owner, best)
    if machine.row_cost[1] > 0.0 and machine.unit[0] == EACH_RANK:
        far = chosen & ~machine.ranks_of_node[node_of_rank[owner]]
        far_of_best = chosen & ~machine.ranks_of_node[node_of_rank[best]]
        cost += machine.row_cost[1] * (count_bits(far) + count_bits(far_of_best))
    elif machine.row_cost[1] > 0.0:
        nodes: Word = np.uint64(0)
        for rank in choice:
            nodes |= ONE << np.uint64(node_of_rank[rank])
        cost += machine.row_cost[1] * rows_between(nodes, node_of_rank[owner], node_of_rank[best])
    return cost


@kernel
def cost_by_expert(machine: Machine, choice: Array, end: Number) -> Number:
    """What rows cost between a token's owner and its experts, one for each expert."""
    cost: Number = 0.0
    for rank in choice:
        if rank != end:
            cost += machine.row_cost[0]
            if machine.node_of_rank[rank] != machine.node_of_rank[end]:
                cost += machine.row_cost[1]
    return cost


@kernel
def rows_between(places: Word, start: Number, end: Number) -> Number:
    """Rows from one place to all others in a set, and from all to another place."""
    return 2 * count_bits(places) - has_bit(places, start) - has_bit(places, end)


@kernel
def best_owner(
    layer: int,
    token: int,
    owner: Number,
    ids: Array,
    machine: Machine,
    choice: Array,
    looks_ahead: bool,
) -> Number:
    """The next owner by `next_owner`: the rank is in the last six bits of what is compared."""
    top_k, last = ids.shape[2], np.int64(MAX_RANKS - 1)
    domain_of_rank = machine.domain_of_rank
    best: Number = np.int64(0)
    for k in range(top_k):
        rank = np.int64(choice[k])
        worth: Number = np.int64(1)
        if looks_ahead:
            for j in range(top_k):
                worth += machine.outlook[layer, ids[layer, token, j], rank]
        else:
            for j in range(top_k):
                worth += choice[j] == rank
        worth = ((2 * worth + (rank == owner)) << 6) | (last - rank)
        may_own = domain_of_rank[rank] == domain_of_rank[owner]
        best = max(best, worth if may_own else np.int64(0))
    return last - (best & last) if best > 0 else np.int64(owner)


@kernel
def start_of(token: int, tokens: Tokens, machine: Machine, hosts: Array, choice: Array) -> Number:
    """The token's first owner by `rules.first_owner`; its home where nothing is foretold."""
    home = np.int64(tokens.home[token])
    if len(tokens.foretold_ids) == 0:
        return home
    choose_copies(0, token, home, tokens.foretold_ids, hosts, machine, choice)
    return best_owner(0, token, home, tokens.foretold_ids, machine, choice, False)


@kernel
def route_layer(
    owners: Array,
    ids: Array,
    hosts: Array,
    machine: Machine,
    choice: Array,
    next_owners: Array,
) -> None:
    """Tokens through one layer, the only one of `ids`, `hosts` and the machine's outlook.

    Fills `choice` (T, K) and `next_owners` (T,).
    """
    for token in range(len(owners)):
        next_owners[token], _ = visit(0, token, owners[token], ids, hosts, machine, choice[token])


@kernel
def route_all(tokens: Tokens, machine: Machine, layout: Layout, flow: Flow, choice: Array) -> None:
    """Walks every token through every layer and writes the flow."""
    layers, count, top_k = tokens.expert_ids.shape
    for token in range(count):
        flow.owner[0, token] = start_of(token, tokens, machine, layout.hosts, choice)
    for layer in range(layers):
        for token in range(count):
            owner = flow.owner[layer, token]
            moved, cost = visit(
                layer, token, owner, tokens.expert_ids, layout.hosts, machine, choice
            )
            flow.owner[layer + 1, token] = moved
            flow.cost[layer, token] = cost
            for k in range(top_k):
                flow.choice[layer, token, k] = choice[k]
                flow.load[layer, choice[k]] += tokens.weight[token]
                if tokens.part[token] >= 0:
                    flow.part_load[layer, tokens.part[token], choice[k]] += tokens.weight[token]


def total_cost(tokens: Tokens, flow: Flow) -> float:
    """Cost of all tokens over all layers."""
    per_token: NDArray[np.float64] = flow.cost.sum(axis=0, dtype=np.float64)
    return float(per_token @ tokens.weight)
