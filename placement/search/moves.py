"""Compiled: changes of a layout, and what they do to the tokens concerned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.search.jit import Array, Number, kernel
from placement.search.walk import ONE, has_bit, start_of, visit

if TYPE_CHECKING:
    from placement.search.state import Layout, Problem, Scratch

FIRST_CHECK = 24
SURE = 1.5  # standard errors
REFUSED = 1e300


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
    """Puts an expert (or EMPTY) into a slot and keeps the bits of copies true."""
    old = layout.slots[layer, rank, slot]
    layout.slots[layer, rank, slot] = expert
    if old >= 0:
        layout.hosts[layer, old] &= ~(ONE << np.uint64(rank))
    if expert >= 0:
        layout.hosts[layer, expert] |= ONE << np.uint64(rank)


@kernel
def may_hold(problem: Problem, layer: int, expert: int, rank: int, leaves: int) -> bool:
    """Whether a rank may take a copy of an expert (-1: none) that leaves another rank (-1: none)."""
    if expert < 0:
        return True
    hosts = problem.layout.hosts[layer, expert]
    if has_bit(hosts, rank):
        return False
    if problem.limits.spread[0] == 0:
        return True
    if leaves >= 0:
        hosts = hosts & ~(ONE << np.uint64(leaves))
    node = problem.machine.node_of_rank[rank]
    return bool((hosts & problem.machine.ranks_of_node[node]) == 0)


@kernel
def follow(problem: Problem, layer: int, token: int, commit: bool) -> Number:
    """Routes a token again from a layer on until it is back on its old way; the cost change.

    Load changes are added to `scratch.load`; `scratch.last[0]` becomes the last layer touched.
    """
    tokens, flow, scratch = problem.tokens, problem.flow, problem.scratch
    layers, top_k = flow.choice.shape[0], flow.choice.shape[2]
    weight, part = tokens.weight[token], tokens.part[token]
    choice = scratch.choice
    owner = np.int64(flow.owner[layer, token])
    if layer == 0:
        owner = start_of(token, tokens, problem.machine, problem.layout.hosts, choice)
        if commit:
            flow.owner[0, token] = owner
    change = 0.0
    while True:
        moved, cost = visit(
            layer, token, owner, tokens.expert_ids, problem.layout.hosts, problem.machine, choice
        )
        change += cost - flow.cost[layer, token]
        for k in range(top_k):
            old = flow.choice[layer, token, k]
            if old != choice[k]:
                scratch.load[layer, old] -= weight
                scratch.load[layer, choice[k]] += weight
                if part >= 0:
                    scratch.part_load[layer, part, old] -= weight
                    scratch.part_load[layer, part, choice[k]] += weight
                if commit:
                    flow.choice[layer, token, k] = choice[k]
        old_owner = flow.owner[layer + 1, token]
        if commit:
            flow.cost[layer, token] = cost
            flow.owner[layer + 1, token] = moved
        scratch.last[0] = max(scratch.last[0], layer)
        layer += 1
        if moved == old_owner or layer == layers:
            return change * weight
        owner = moved


@kernel
def reroute(problem: Problem, layer: int, a: int, b: int, limit: float, commit: bool) -> float:
    """Cost change of the tokens that use expert a or b at a layer (-1: none).

    Tokens are in random order, so the first ones tell what all will cost: a change that is
    above `limit` by `SURE` standard errors is given up early (REFUSED is returned).
    """
    users, start = problem.tokens.users, problem.tokens.start
    i, i_end, j, j_end = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    if a >= 0:
        i, i_end = start[layer, a], start[layer, a + 1]
    if b >= 0:
        j, j_end = start[layer, b], start[layer, b + 1]
    total = i_end - i + j_end - j
    done, check, change, squares = 0, FIRST_CHECK, 0.0, 0.0
    while i < i_end or j < j_end:
        if j == j_end or (i < i_end and users[layer, i] < users[layer, j]):
            token = users[layer, i]
            i += 1
        else:
            token = users[layer, j]
            if i < i_end and users[layer, i] == token:
                i += 1
                done += 1
            j += 1
        step = follow(problem, layer, token, commit)
        done += 1
        change += step
        squares += step * step
        if done >= check and not commit:
            check = done + done // 2
            mean = change / done
            spread = (squares / done - mean * mean) * (1.0 / done) * (1.0 - done / total)
            if spread >= 0.0 and mean - SURE * spread**0.5 > limit / total:
                return REFUSED
    return change


@kernel
def settle(problem: Problem, layer: int, keep: bool) -> None:
    """Clears the load changes of the layers touched, after adding them to the load or not."""
    flow, scratch = problem.flow, problem.scratch
    parts, width = flow.part_load.shape[1], flow.load.shape[1]
    for touched in range(layer, scratch.last[0] + 1):
        for rank in range(width):
            if keep:
                flow.load[touched, rank] += scratch.load[touched, rank]
            for part in range(parts):
                if keep:
                    flow.part_load[touched, part, rank] += scratch.part_load[touched, part, rank]
        clear(scratch, touched)
    scratch.last[0] = layer


@kernel
def clear(scratch: Scratch, layer: int) -> None:
    """Forgets the load changes of a layer."""
    for rank in range(scratch.load.shape[1]):
        scratch.load[layer, rank] = 0.0
        for part in range(scratch.part_load.shape[1]):
            scratch.part_load[layer, part, rank] = 0.0


@kernel
def load_cost(problem: Problem, layer: int, changed: bool) -> float:
    """What uneven load costs at one layer, now or after the change."""
    flow, limits, scratch = problem.flow, problem.limits, problem.scratch
    node_of_rank = problem.machine.node_of_rank
    uneven, over, node_load = 0.0, 0.0, 0.0
    parts, width = flow.part_load.shape[1], flow.load.shape[1]
    for rank in range(width):
        value = flow.load[layer, rank]
        if changed:
            value += scratch.load[layer, rank]
        if parts == 0:
            uneven += max(0.0, value - limits.even_load[layer])
        over += max(0.0, value - limits.rank_load[layer])
        node_load += value
        if rank + 1 == width or node_of_rank[rank + 1] != node_of_rank[rank]:
            over += max(0.0, node_load - limits.node_load[layer])
            node_load = 0.0
    for part in range(parts):
        for rank in range(width):
            value = flow.part_load[layer, part, rank]
            if changed:
                value += scratch.part_load[layer, part, rank]
            uneven += max(0.0, value - limits.even_part[layer, part])
    return float(limits.price[0] * uneven + limits.price[1] * over)
