"""Many searches instead of one: the best layers of all are what the next ones start from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from placement.search.recombine import recombine
from placement.search.solve import solve
from placement.search.state import copied, make_flow
from placement.search.walk import total_cost
from placement.traffic import imbalance_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from placement.search.caps import Caps
    from placement.search.solve import Search

LEAST_EFFORT = 4.0
SEARCHES, GENERATIONS = 4, 2
SHARE, LAST_SHARE = 0.125, 0.25


def solve_by_generations(searches: Iterable[Search], *, wanted: Caps, effort: float) -> Search:
    """Anneals several layouts, recombines them, and anneals what comes of it again.

    Args:
        searches: with different seeds, not begun; all at one pace.
        wanted: caps.
        effort: of all together.

    Returns:
        The last search; if time is up before, the cheapest.
    """
    finished: list[Search] = []
    for generation in range(GENERATIONS + 1):
        is_last = generation == GENERATIONS
        if generation:
            searches = next_generation(finished[-SEARCHES:])[: 1 if is_last else None]
        for search in searches:
            share = LAST_SHARE if is_last else SHARE
            solve(search, wanted=wanted, effort=effort * share, is_fresh=generation == 0)
            finished.append(search)
            if not is_last and search.pace.is_over():
                return cheapest_of(finished)
    return finished[-1]


def cheapest_of(searches: Sequence[Search]) -> Search:
    """The search whose layout costs the tokens least."""
    return min(searches, key=lambda search: total_cost(search.tokens, search.flow()))


def next_generation(searches: Sequence[Search]) -> list[Search]:
    """As many searches, all from the best layers of these."""
    tokens, layouts = searches[0].tokens, [search.layout for search in searches]
    flows = [make_flow(tokens, search.machine, search.layout) for search in searches]
    mean = float(np.mean([imbalance_of(flow.load).mean() for flow in flows]))
    layout = recombine(tokens, searches[0].machine, layouts, flows, mean)
    return [
        replace(
            search,
            layout=copied(layout),
            seed=search.seed + len(searches),
        )
        for search in searches
    ]
