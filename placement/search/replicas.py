"""Spare slots filled with the copies that cost the tokens least."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.search.jit import Array, Number, kernel
from placement.search.moves import may_hold, put, reroute, settle
from placement.search.state import EMPTY

if TYPE_CHECKING:
    from placement.search.state import Problem

BUSIEST, QUIETEST = 4, 4


def fill_spare_slots(problem: Problem) -> None:
    """Fills every empty slot, for engines want all slots in use.

    Candidates are the experts whose copy would save most rows at first sight, and the least used
    ones, which change least; the one with the least true cost is taken, be it above 0.
    """
    layout, flow = problem.layout, problem.flow
    _, experts = layout.hosts.shape
    width = flow.load.shape[1]
    for layer in np.unique(np.argwhere(layout.slots == EMPTY)[:, 0]):
        used = np.diff(problem.tokens.start[layer])
        quiet = np.argsort(used, kind="stable")
        savings, moved = np.zeros((experts, width)), np.zeros((experts, width))
        count_savings(problem, layer, savings, moved)
        for rank, slot in np.argwhere(layout.slots[layer] == EMPTY):
            full = flow.load[layer, rank] + moved[:, rank] > problem.limits.rank_load[layer]
            busy = np.argsort(np.where(full, np.inf, -savings[:, rank]), kind="stable")
            may = [e for e in busy if may_hold(problem, layer, int(e), rank, -1)][:BUSIEST]
            may += [e for e in quiet if may_hold(problem, layer, int(e), rank, -1)][:QUIETEST]
            if may:
                costs = [try_copy(problem, layer, rank, slot, int(e), False) for e in may]
                try_copy(problem, layer, rank, slot, int(may[int(np.argmin(costs))]), True)


@kernel
def try_copy(
    problem: Problem, layer: int, rank: int, slot: int, expert: int, commit: bool
) -> float:
    """What a copy in an empty slot costs (below 0: saves); it stays there if `commit`."""
    put(problem.layout, layer, rank, slot, expert)
    problem.scratch.last[0] = layer
    change = reroute(problem, layer, expert, -1, np.inf, commit)
    settle(problem, layer, commit)
    if not commit:
        put(problem.layout, layer, rank, slot, EMPTY)
    return change


@kernel
def count_savings(problem: Problem, layer: int, savings: Array, moved: Array) -> None:
    """Adds up, for a copy of each expert on each rank, the rows it saves and the load it takes.

    A token saves the rows to a rank that runs one of its experts only, if that expert has a copy
    on its owner or on another rank that the token visits.
    """
    tokens, flow = problem.tokens, problem.flow
    top_k = flow.choice.shape[2]
    for token in range(flow.owner.shape[1]):
        weight = tokens.weight[token]
        owner, moves_to = flow.owner[layer, token], flow.owner[layer + 1, token]
        for k in range(top_k):
            rank, expert = flow.choice[layer, token, k], tokens.expert_ids[layer, token, k]
            if count_on(flow.choice, layer, token, rank, top_k) > 1:
                continue
            worth = np.float64(2 - (rank == owner) - (rank == moves_to))
            if rank != owner:
                stays = count_on(flow.choice, layer, token, owner, top_k) > 0
                savings[expert, owner] += weight * (worth - (0.0 if stays else 1.0))
                moved[expert, owner] += weight
            for j in range(top_k):
                other = flow.choice[layer, token, j]
                if other != owner and count_on(flow.choice, layer, token, other, j) == 0:
                    savings[expert, other] += weight * worth
                    moved[expert, other] += weight


@kernel
def count_on(choice: Array, layer: int, token: int, rank: Number, stop: int) -> Number:
    """How many of a token's first `stop` choices are on a rank."""
    found = 0
    for j in range(stop):
        found += choice[layer, token, j] == rank
    return found
