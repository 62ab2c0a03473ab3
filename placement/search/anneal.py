"""Compiled: simulated annealing of a layout on the tokens' true cost, under load caps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from placement.search.jit import kernel
from placement.search.moves import (
    REFUSED,
    clear,
    draw,
    load_cost,
    may_hold,
    put,
    reroute,
    settle,
)
from placement.search.walk import ONE, count_bits

if TYPE_CHECKING:
    from placement.search.state import Problem

DRAWS = 1 << 30


@kernel
def propose_rank(problem: Problem, layer: int, rank: int, expert: int) -> int:
    """A rank to move an expert to: mostly one that a random token of the expert visits."""
    tokens, flow, rng = problem.tokens, problem.flow, problem.scratch.rng
    layers, _, top_k = flow.choice.shape
    first, last = tokens.start[layer, expert], tokens.start[layer, expert + 1]
    if last > first and draw(rng, 4) > 0:
        token = tokens.users[layer, first + draw(rng, last - first)]
        near = layer + draw(rng, 4) - 2
        if near < layer - 1 or near < 0 or near >= layers:
            near = layer
        target = flow.choice[near, token, draw(rng, top_k)]
        if target != rank:
            return int(target)
    target = draw(rng, flow.load.shape[1] - 1)
    return int(target + (target >= rank))


@kernel
def is_kept(problem: Problem, layer: int, a: int, b: int, new: int, temperature: float) -> bool:
    """Keeps or refuses a change of experts a and b already made to the layout.

    `new` copies are where none was before the search.
    """
    scratch = problem.scratch
    if new > 0 and scratch.moved[0] + new > problem.limits.budget[0]:
        return False
    scratch.last[0] = layer
    bar = -temperature * math.log((1.0 + draw(scratch.rng, DRAWS)) / DRAWS)
    before = load_cost(problem, layer, False)
    change = reroute(problem, layer, a, b, bar + before, False)
    after = 0.0
    if change < REFUSED:
        for touched in range(layer, scratch.last[0] + 1):
            after += load_cost(problem, touched, True)
            if touched > layer:
                before += load_cost(problem, touched, False)
    keep = change + after - before <= bar
    settle(problem, layer, keep)
    if keep:
        scratch.moved[0] += new
        reroute(problem, layer, a, b, 0.0, True)
        _forget(problem, layer)
    return keep


@kernel
def _forget(problem: Problem, layer: int) -> None:
    """Clears what committing added to the load changes once more."""
    for touched in range(layer, problem.scratch.load.shape[0]):
        clear(problem.scratch, touched)


@kernel
def count_new(problem: Problem, layer: int, expert: int) -> int:
    """Copies of an expert (-1: none) on ranks that had none before the search."""
    if expert < 0:
        return 0
    return int(
        count_bits(problem.layout.hosts[layer, expert] & ~problem.limits.origin[layer, expert])
    )


@kernel
def try_replica(
    problem: Problem, layer: int, place: tuple[int, int], a: int, temperature: float
) -> bool:
    """Tries a copy of expert a in place of a spare copy or nothing."""
    rank, slot = place
    b = problem.layout.slots[layer, rank, slot]
    hosts_b = problem.layout.hosts[layer, max(b, 0)]
    if (b >= 0 and (hosts_b & (hosts_b - ONE)) == 0) or not may_hold(problem, layer, a, rank, -1):
        return False
    old = count_new(problem, layer, a) + count_new(problem, layer, b)
    put(problem.layout, layer, rank, slot, a)
    new = count_new(problem, layer, a) + count_new(problem, layer, b) - old
    if is_kept(problem, layer, a, b, new, temperature):
        return True
    put(problem.layout, layer, rank, slot, b)
    return False


@kernel
def try_swap(
    problem: Problem,
    layer: int,
    place: tuple[int, int],
    other: tuple[int, int],
    temperature: float,
) -> bool:
    """Tries to exchange the experts of two slots; one of them may be empty."""
    layout = problem.layout
    a, b = layout.slots[layer, place[0], place[1]], layout.slots[layer, other[0], other[1]]
    if not may_hold(problem, layer, a, other[0], place[0]):
        return False
    if not may_hold(problem, layer, b, place[0], other[0]):
        return False
    old = count_new(problem, layer, a) + count_new(problem, layer, b)
    put(layout, layer, place[0], place[1], b)
    put(layout, layer, other[0], other[1], a)
    new = count_new(problem, layer, a) + count_new(problem, layer, b) - old
    if is_kept(problem, layer, a, b, new, temperature):
        return True
    put(layout, layer, other[0], other[1], b)
    put(layout, layer, place[0], place[1], a)
    return False


@kernel
def anneal(problem: Problem, moves: int, temperature: float) -> int:
    """Tries `moves` random changes at one temperature; how many were kept."""
    layers, width, num_slots = problem.layout.slots.shape
    rng, kept = problem.scratch.rng, 0
    for _ in range(moves):
        layer, rank, slot = draw(rng, layers), draw(rng, width), draw(rng, num_slots)
        a = problem.layout.slots[layer, rank, slot]
        if a < 0 or width == 1:
            continue
        other = (propose_rank(problem, layer, rank, a), draw(rng, num_slots))
        if problem.limits.replicas[0] > 0 and draw(rng, 2) == 0:
            kept += try_replica(problem, layer, other, a, temperature)
        else:
            kept += try_swap(problem, layer, (rank, slot), other, temperature)
    return kept
