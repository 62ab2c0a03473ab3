"""Compiled: changes of a layout, and what they do to the tokens concerned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.search.jit import Array, Number, kernel
from placement.search.walk import ONE, visit

if TYPE_CHECKING:
    from placement.search.state import Flow, Layout, Limits, Machine, Scratch, Tokens

FIRST_CHECK = 48


@kernel
def draw(rng: Array, stop: int) -> int:
    """A number below `stop` from a xorshift64* generator of one word."""
    x = rng[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    rng[0] = x
    return int(((x * 0x2545F4914F6CDD1D) >> 33) % stop)


@kernel
def put(layout: Layout, layer: int, rank: int, slot: int, expert: int) -> None:
    """Puts an expert (or EMPTY) into a slot and keeps the list of copies true."""
    old = layout.slots[layer, rank, slot]
    layout.slots[layer, rank, slot] = expert
    if old >= 0:
        layout.hosts[layer, old] &= ~(ONE << np.uint64(rank))
    if expert >= 0:
        layout.hosts[layer, expert] |= ONE << np.uint64(rank)


@kernel
def follow(
    tokens: Tokens,
    machine: Machine,
    layout: Layout,
    flow: Flow,
    scratch: Scratch,
    layer: int,
    token: int,
    commit: bool,
) -> Number:
    """Routes a token again from a layer on until it is back on its old way; the cost change.

    Load changes are added to `scratch.load`; `scratch.last[0]` becomes the last layer touched.
    """
    layers, top_k = flow.choice.shape[0], flow.choice.shape[2]
    weight = tokens.weight[token]
    owner = np.int64(flow.owner[layer, token])
    choice = scratch.choice
    change = 0.0
    while True:
        moved, cost = visit(layer, token, owner, tokens.expert_ids, layout.hosts, machine, choice)
        change += cost - flow.cost[layer, token]
        for k in range(top_k):
            old = flow.choice[layer, token, k]
            if old != choice[k]:
                scratch.load[layer, old] -= weight
                scratch.load[layer, choice[k]] += weight
                if commit:
                    flow.choice[layer, token, k] = choice[k]
        old_owner = flow.owner[layer + 1, token]
        if commit:
            flow.cost[layer, token] = cost
            flow.owner[layer + 1, token] = moved
        if layer > scratch.last[0]:
            scratch.last[0] = layer
        layer += 1
        if moved == old_owner or layer == layers:
            return change * weight
        owner = moved


@kernel
def reroute(
    tokens: Tokens,
    machine: Machine,
    layout: Layout,
    flow: Flow,
    scratch: Scratch,
    layer: int,
    a: int,
    b: int,
    limit: float,
    commit: bool,
) -> Number:
    """Cost change of the tokens that use expert a or b at a layer (-1: none).

    Tokens are in random order, so the first ones tell what all will cost: a change that is
    above `limit` by three standard errors is given up early (infinity is returned).
    """
    users, start = tokens.users[layer], tokens.start[layer]
    i, i_end, j, j_end = 0, 0, 0, 0
    if a >= 0:
        i, i_end = start[a], start[a + 1]
    if b >= 0:
        j, j_end = start[b], start[b + 1]
    total = i_end - i + j_end - j
    done, check, change, squares = 0, FIRST_CHECK, 0.0, 0.0
    while i < i_end or j < j_end:
        if j == j_end or (i < i_end and users[i] < users[j]):
            token = users[i]
            i += 1
        else:
            token = users[j]
            if i < i_end and users[i] == token:
                i += 1
                done += 1
            j += 1
        step = follow(tokens, machine, layout, flow, scratch, layer, token, commit)
        done += 1
        change += step
        squares += step * step
        if done >= check and not commit:
            check = 2 * done
            mean = change / done
            spread = (squares / done - mean * mean) * (1.0 / done) * (1.0 - done / total)
            if spread >= 0.0 and mean - 3.0 * spread**0.5 > limit / total:
                return 1e300
    return change


@kernel
def forget(scratch: Scratch, layer: int) -> None:
    """Clears the load changes of the layers touched."""
    for touched in range(layer, scratch.last[0] + 1):
        for rank in range(scratch.load.shape[1]):
            scratch.load[touched, rank] = 0.0
    scratch.last[0] = layer


@kernel
def excess(load: Array, change: Array, limits: Limits, layer: int) -> float:
    """Token load above the caps of ranks and nodes at one layer, after a change of load."""
    over, node, node_load = 0.0, 0, 0.0
    width = load.shape[1]
    for rank in range(width):
        value = load[layer, rank] + change[layer, rank]
        if value > limits.rank_load[layer]:
            over += value - limits.rank_load[layer]
        node_load += value
        node = limits.node_of_rank[rank]
        if rank + 1 == width or limits.node_of_rank[rank + 1] != node:
            if node_load > limits.node_load[layer]:
                over += node_load - limits.node_load[layer]
            node_load = 0.0
    return over
