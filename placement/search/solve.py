"""From tokens to a layout: annealing with falling temperature, under caps that hold elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.search.anneal import anneal
from placement.search.caps import (
    LEAST_HEADROOM,
    NOISE_SHARE,
    Caps,
    expected_imbalance,
    steered,
)
from placement.search.outlook import fit_outlook
from placement.search.pace import Pace
from placement.search.replicas import fill_spare_slots
from placement.search.state import (
    Flow,
    Layout,
    Limits,
    Machine,
    Problem,
    Tokens,
    copied,
    first_tokens,
    make_flow,
    make_scratch,
)
from placement.traffic import imbalance_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOVES_PER_EXPERT = 6
COST_PER_STEP = 7.5e6
FILL_SAMPLE = 8000
VISITS, QUICK_VISITS = 1e7, 2e6
LOW_PRICE, HIGH_PRICE = 2.0, 20.0
REPAIRS, REPAIR_PRICE = 3, 100.0
FIRST_PRICE, HASTE = 1.2, 2.0
LAST_STEPS, MOVES_AT_ONCE, REPLICA_SHARE = 2, 1000, 0.5


class Stage(NamedTuple):
    """A part of the cooling: temperatures in rows per token of an expert, and tokens looked at."""

    hot: float
    cold: float
    steps: int
    sample: int


REPLICA_STAGES: tuple[Stage, ...] = (Stage(0.2, 0.05, 28, 4000), Stage(0.05, 0.02, 16, 8000))
LAST_REPLICA_STAGES: tuple[Stage, ...] = (
    Stage(0.02, 0.01, 10, 24000),
    Stage(0.01, 0.005, 10, 24000),
)
LAST_STAGES = (
    Stage(0.05, 0.03, 4, 8000),
    Stage(0.03, 0.015, 4, 8000),
    Stage(0.015, 0.008, 4, 16000),
    Stage(0.008, 0.004, 4, 16000),
)
REPAIR_STAGE = Stage(0.004, 0.002, 2, 1 << 40)


@dataclass(kw_only=True)
class Search:
    """A layout under search, with all that the compiled loops need.

    Attributes:
        tokens: the tokens, in random order.
        machine: ranks and prices.
        layout: where experts are; changes as the search goes on.
        origin: uint64 (L, E) where copies were at first.
        sequence: (T,) sequence of each token, counted from 0.
        seed: of all random choices.
        replicas: whether experts may have several copies.
        spread: whether copies must be on different nodes.
        looks_ahead: whether owners follow an outlook.
        max_moves: copies that may be somewhere new; None: any number.
        pace: how much time there is.
        price: of uneven load, in rows a token; found as the search goes on.
    """

    tokens: Tokens
    machine: Machine
    layout: Layout
    origin: NDArray[np.uint64]
    sequence: NDArray[np.int64]
    seed: int
    replicas: bool
    spread: bool = False
    looks_ahead: bool = False
    max_moves: int | None = None
    pace: Pace = field(default_factory=Pace)
    price: float = FIRST_PRICE

    def flow(self) -> Flow:
        """How the tokens travel now."""
        return make_flow(self.tokens, self.machine, self.layout)

    def look_ahead(self, visits: float) -> None:
        """Fits the outlook to the layout as it is, by so many visits of tokens to layers."""
        if self.looks_ahead:
            outlook = fit_outlook(self.tokens, self.machine, self.layout, visits=visits)
            self.machine = self.machine._replace(outlook=outlook)

    def fill(self, caps: Caps) -> None:
        """Fills the spare slots that are empty."""
        fill_spare_slots(self.problem(FILL_SAMPLE, caps, self.seed))

    def limits(self, flow: Flow, caps: Caps) -> Limits:
        """Caps on load as absolute numbers, and the rules of this search."""
        total = flow.load.sum(axis=1)
        width, nodes = len(self.machine.node_of_rank), len(self.machine.ranks_of_node)
        return Limits(
            rank_load=total * (caps.rank / width),
            node_load=total * (caps.node / nodes if nodes > 1 else np.inf),
            even_load=total * (caps.even / width),
            even_part=flow.part_load.sum(axis=2) * (caps.even / width),
            price=np.array([0.0, LOW_PRICE]),
            origin=self.origin,
            replicas=np.array([int(self.replicas)]),
            spread=np.array([int(self.spread)]),
            budget=np.array([1 << 40 if self.max_moves is None else self.max_moves]),
        )

    def problem(self, sample: int, caps: Caps, seed: int) -> Problem:
        """All that the loops need, on the first `sample` tokens."""
        experts = self.layout.hosts.shape[1]
        tokens = self.tokens
        if sample < tokens.expert_ids.shape[1]:
            tokens = first_tokens(tokens, sample, experts)
        flow = make_flow(tokens, self.machine, self.layout)
        scratch = make_scratch(flow, seed=seed)
        scratch.moved[0] = np.bitwise_count(self.layout.hosts & ~self.origin).sum()
        limits = self.limits(flow, caps)
        return Problem(tokens, self.machine, self.layout, flow, limits, scratch)

    def cool(self, stage: Stage, *, effort: float, caps: Caps, top: float, needed: int = 0) -> None:
        """Anneals on a sample of the tokens; the price of load above caps rises to `top`.

        Short of time, it skips steps, but not the last `needed` ones.
        """
        layers, experts = self.layout.hosts.shape
        _, count, top_k = self.tokens.expert_ids.shape
        sample = int(stage.sample * max(1.0, effort))
        users = min(sample, count) * top_k / experts
        affordable = COST_PER_STEP / top_k / (48 + users / 5)
        moves = int(min(MOVES_PER_EXPERT * layers * experts, affordable))
        heats = np.geomspace(stage.hot, stage.cold, stage.steps) * users
        over = np.geomspace(LOW_PRICE, top, stage.steps)
        problem = None
        for step, heat in enumerate(heats):
            effort_now = self.pace.step(effort, is_needed=step >= stage.steps - needed)
            if effort_now == 0:
                continue
            problem = problem or self.problem(sample, caps, self.seed + stage.steps)
            problem.limits.price[:] = self.price, over[step]
            for piece in self.pace.pieces(max(1, int(moves * effort_now)), MOVES_AT_ONCE):
                anneal(problem, piece, float(heat))
            self.price = steered(self.price, problem.flow.load, caps.mean, HASTE)


def solve(search: Search, *, wanted: Caps, effort: float, is_fresh: bool = True) -> None:
    """Anneals a layout; short of time, with fewer steps.

    Args:
        search: what to anneal.
        wanted: caps, on tokens not seen.
        effort: how much search.
        is_fresh: whether replicas have yet to be found.
    """
    caps, pace = wanted.within(), search.pace
    finds_replicas = search.replicas and search.max_moves is None
    if finds_replicas and is_fresh:
        find_replicas(search, effort=effort, caps=caps)
    search.look_ahead(QUICK_VISITS)
    caps = caps._replace(mean=tightened(search, wanted.mean, caps.mean))
    stages = LAST_REPLICA_STAGES if search.replicas else LAST_STAGES
    with pace.phase("affinity", sum(stage.steps for stage in stages)):
        for stage in stages:
            needed = LAST_STEPS if stage is stages[-1] else 0
            search.cool(stage, effort=effort, caps=caps, top=HIGH_PRICE, needed=needed)
            if needed or not pace.is_over():
                search.look_ahead(QUICK_VISITS)
        for _ in range(REPAIRS):
            if imbalance_of(search.flow().load).max() <= wanted.rank:
                break
            steps = REPAIR_STAGE.steps
            search.cool(REPAIR_STAGE, effort=1.0, caps=caps, top=REPAIR_PRICE, needed=steps)
    if finds_replicas:
        search.fill(caps)
    if not search.replicas:
        search.look_ahead(VISITS)  # again for the final layout; with copies it would move load


def find_replicas(search: Search, *, effort: float, caps: Caps) -> None:
    """Anneals from a layout without replicas to one with some.

    From empty slots and hot it finds most, but takes long to cool. So where time is limited, the
    slots are first filled with what saves most at first sight, and the search starts cooler; and
    interrupted while hot, it goes back to slots filled so.
    """
    pace, stages, before = search.pace, REPLICA_STAGES, copied(search.layout)
    if pace.is_limited:
        stages = REPLICA_STAGES[1:]
        search.fill(caps)
    steps = sum(stage.steps for stage in stages)
    with pace.phase("affinity, replicas", steps, share=REPLICA_SHARE):
        for stage in stages:
            search.cool(stage, effort=effort, caps=caps, top=LOW_PRICE)
    if pace.is_over():
        search.layout = before
        search.fill(caps)


def tightened(search: Search, wanted: float, mean: float) -> float:
    """The mean to keep on these tokens, lower where the load of other sequences is less certain.

    The whole of the expected difference would be too cautious for text of the same mix.
    """
    flow = search.flow()
    elsewhere = expected_imbalance(flow, search.sequence, seed=search.seed).mean()
    noise = float(elsewhere - imbalance_of(flow.load).mean())
    return max(1 + (wanted - 1) * LEAST_HEADROOM, min(mean, wanted - NOISE_SHARE * noise))
