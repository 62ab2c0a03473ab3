"""Compiled: one token's way through one layer, by the rules of `placement.traffic`.

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
def nearest_copy(
    hosts: Word, chosen: Word, owner: Number, turn: Number, node_mask: Word, visited: Word
) -> Number:
    """The copy of an expert that `choose_ranks` takes.

    Args:
        hosts: ranks with a copy.
        chosen: ranks chosen so far for the token.
        owner: the token's owner.
        turn: owner + expert, where the search for the first copy starts.
        node_mask: ranks of the owner's node.
        visited: ranks of the nodes visited so far.
    """
    if has_bit(hosts, owner):
        return np.int64(owner)
    for wanted in (chosen, node_mask, visited):
        if hosts & wanted:
            hosts = hosts & wanted
    above = hosts & ~((ONE << np.uint64(turn)) - ONE)
    return lowest_bit(above if above else hosts)


@kernel
def visit(
    layer: int, token: int, owner: Number, ids: Array, hosts: Array, machine: Machine, choice: Array
) -> tuple[Number, Number]:
    """Routes one token at one layer.

    Fills `choice` (K,) with the rank of each expert (see `choose_ranks`); returns the next owner
    (see `next_owner`) and what the token's rows cost.
    """
    top_k = ids.shape[2]
    node_of_rank = machine.node_of_rank
    chosen: Word = np.uint64(0)
    nodes: Word = np.uint64(0)
    is_open = False
    for k in range(top_k):
        expert_hosts = hosts[layer, ids[layer, token, k]]
        choice[k] = -1
        if expert_hosts & (expert_hosts - ONE):
            is_open = True
        else:
            rank = lowest_bit(expert_hosts)
            choice[k] = rank
            chosen |= ONE << np.uint64(rank)
            nodes |= ONE << np.uint64(node_of_rank[rank])
    if is_open:
        visited: Word = np.uint64(0)
        for k in range(top_k):
            if choice[k] >= 0:
                visited |= machine.ranks_of_node[node_of_rank[choice[k]]]
        for k in range(top_k):
            if choice[k] >= 0:
                continue
            expert = ids[layer, token, k]
            turn = (np.int64(owner) + np.int64(expert)) % np.int64(len(node_of_rank))
            own_node = machine.ranks_of_node[node_of_rank[owner]]
            rank = nearest_copy(hosts[layer, expert], chosen, owner, turn, own_node, visited)
            choice[k] = rank
            chosen |= ONE << np.uint64(rank)
            nodes |= ONE << np.uint64(node_of_rank[rank])
            visited |= machine.ranks_of_node[node_of_rank[rank]]
    best, most, domain = np.int64(owner), 0, machine.domain_of_rank[owner]
    has_outlook = machine.outlook.shape[0] > 0
    for k in range(top_k):
        rank = np.int64(choice[k])
        same: Number = np.int64(0)
        if has_outlook:
            same += 1
            for j in range(top_k):
                same += machine.outlook[layer, ids[layer, token, j], rank]
        else:
            for j in range(top_k):
                same += choice[j] == rank
        if machine.domain_of_rank[rank] == domain and (
            same > most or (same == most and best != owner and (rank == owner or rank < best))
        ):
            best, most = rank, same
    ranks = 2 * count_bits(chosen) - has_bit(chosen, owner) - has_bit(chosen, best)
    cost = machine.row_cost[0] * ranks
    if machine.row_cost[1] > 0.0:
        own, new = node_of_rank[owner], node_of_rank[best]
        entered = 2 * count_bits(nodes) - has_bit(nodes, own) - has_bit(nodes, new)
        cost += machine.row_cost[1] * entered
    return best, cost


@kernel
def route_all(tokens: Tokens, machine: Machine, layout: Layout, flow: Flow, choice: Array) -> None:
    """Walks every token through every layer and writes the flow."""
    layers, count, top_k = tokens.expert_ids.shape
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


def total_cost(tokens: Tokens, flow: Flow) -> float:
    """Cost of all tokens over all layers."""
    per_token: NDArray[np.float64] = flow.cost.sum(axis=0, dtype=np.float64)
    return float(per_token @ tokens.weight)
