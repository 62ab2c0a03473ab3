"""Compiled: simulated annealing of a layout on the tokens' true cost, under load caps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from placement.search.jit import Array, kernel
from placement.search.moves import draw, excess, forget, put, reroute
from placement.search.walk import ONE, has_bit

if TYPE_CHECKING:
    from placement.search.state import Flow, Layout, Limits, Machine, Scratch, Tokens


@kernel
def propose_rank(
    tokens: Tokens, flow: Flow, scratch: Scratch, layer: int, rank: int, expert: int
) -> int:
    """A rank to move an expert to: mostly one that a random token of the expert visits."""
    layers, _, top_k = flow.choice.shape
    width = flow.load.shape[1]
    first, last = tokens.start[layer, expert], tokens.start[layer, expert + 1]
    if last > first and draw(scratch.rng, 4) > 0:
        token = tokens.users[layer, first + draw(scratch.rng, last - first)]
        near = layer + draw(scratch.rng, 4) - 2
        if near < layer - 1 or near < 0 or near >= layers:
            near = layer
        target = flow.choice[near, token, draw(scratch.rng, top_k)]
        if target != rank:
            return int(target)
    target = draw(scratch.rng, width - 1)
    return int(target + (target >= rank))


@kernel
def try_change(
    tokens: Tokens,
    machine: Machine,
    layout: Layout,
    flow: Flow,
    limits: Limits,
    scratch: Scratch,
    layer: int,
    a: int,
    b: int,
    temperature: float,
    penalty: float,
) -> float:
    """Keeps or refuses a change already made to the layout: its cost change, or infinity."""
    bar = -temperature * math.log((1.0 + draw(scratch.rng, 1 << 30)) / (1 << 30))
    zero = scratch.load
    before = excess(flow.load, zero, limits, layer) * penalty
    change = reroute(tokens, machine, layout, flow, scratch, layer, a, b, bar + before, False)
    if change < 1e299:
        after = 0.0
        for touched in range(layer, scratch.last[0] + 1):
            after += excess(flow.load, scratch.load, limits, touched) * penalty
        end = scratch.last[0]
        for touched in range(layer + 1, end + 1):
            before += _excess_now(flow.load, limits, touched) * penalty
        if change + after - before <= bar:
            for touched in range(layer, end + 1):
                for rank in range(flow.load.shape[1]):
                    flow.load[touched, rank] += scratch.load[touched, rank]
            reroute(tokens, machine, layout, flow, scratch, layer, a, b, 0.0, True)
            forget(scratch, layer)
            return change
    forget(scratch, layer)
    return 1e300


@kernel
def _excess_now(load: Array, limits: Limits, layer: int) -> float:
    over, node_load = 0.0, 0.0
    width = load.shape[1]
    for rank in range(width):
        over += max(0.0, load[layer, rank] - limits.rank_load[layer])
        node_load += load[layer, rank]
        if rank + 1 == width or limits.node_of_rank[rank + 1] != limits.node_of_rank[rank]:
            over += max(0.0, node_load - limits.node_load[layer])
            node_load = 0.0
    return over


@kernel
def anneal(
    tokens: Tokens,
    machine: Machine,
    layout: Layout,
    flow: Flow,
    limits: Limits,
    scratch: Scratch,
    moves: int,
    temperature: float,
    penalty: float,
) -> int:
    """Tries `moves` random changes at one temperature; how many were kept."""
    layers, width, num_slots = layout.slots.shape
    kept = 0
    for _ in range(moves):
        layer, rank, slot = (
            draw(scratch.rng, layers),
            draw(scratch.rng, width),
            draw(scratch.rng, num_slots),
        )
        a = layout.slots[layer, rank, slot]
        if a < 0:
            continue
        other = propose_rank(tokens, flow, scratch, layer, rank, a)
        if has_bit(layout.hosts[layer, a], other):
            continue
        scratch.last[0] = layer
        other_slot = draw(scratch.rng, num_slots)
        b = layout.slots[layer, other, other_slot]
        copies = limits.replicas[0] > 0 and (
            b < 0 or (layout.hosts[layer, b] & (layout.hosts[layer, b] - ONE)) != 0
        )
        if copies and draw(scratch.rng, 2) == 0:
            put(layout, layer, other, other_slot, a)
            if (
                try_change(
                    tokens,
                    machine,
                    layout,
                    flow,
                    limits,
                    scratch,
                    layer,
                    a,
                    b,
                    temperature,
                    penalty,
                )
                < 1e299
            ):
                kept += 1
            else:
                put(layout, layer, other, other_slot, b)
            continue
        if b >= 0 and has_bit(layout.hosts[layer, b], rank):
            continue
        put(layout, layer, rank, slot, b)
        put(layout, layer, other, other_slot, a)
        if (
            try_change(
                tokens, machine, layout, flow, limits, scratch, layer, a, b, temperature, penalty
            )
            < 1e299
        ):
            kept += 1
        else:
            put(layout, layer, other, other_slot, b)
            put(layout, layer, rank, slot, a)
    return kept
