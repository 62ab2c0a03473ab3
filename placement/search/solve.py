"""From tokens to a layout: annealing with falling temperature under caps that hold elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.search.anneal import anneal
from placement.search.state import (
    Flow,
    Layout,
    Limits,
    Machine,
    Tokens,
    first_tokens,
    make_flow,
    make_scratch,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOVES_PER_EXPERT = 12
HEADROOM = 0.7
LOW_PENALTY, HIGH_PENALTY = 2.0, 20.0
ALL = 1 << 40


class Stage(NamedTuple):
    """A part of the cooling: temperatures in rows per token of an expert, and tokens looked at."""

    hot: float
    cold: float
    steps: int
    sample: int


STAGES = (
    Stage(0.4, 0.1, 14, 2500),
    Stage(0.1, 0.03, 12, 8000),
    Stage(0.03, 0.008, 10, ALL),
)


@dataclass(kw_only=True)
class Search:
    """A layout under search, with all that the compiled loops need."""

    tokens: Tokens
    machine: Machine
    layout: Layout
    sequence: NDArray[np.int64]
    replicas: bool
    seed: int
    deadline: float | None = None

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def flow(self) -> Flow:
        """How the tokens travel now."""
        return make_flow(self.tokens, self.machine, self.layout)

    def limits(self, flow: Flow, cap: float, node_cap: float) -> Limits:
        """Caps on load as absolute numbers."""
        total = flow.load.sum(axis=1)
        nodes = int(self.machine.node_of_rank[-1]) + 1
        return Limits(
            rank_load=total * (cap / len(self.machine.node_of_rank)),
            node_load=total * (node_cap / nodes if nodes > 1 else np.inf),
            node_of_rank=self.machine.node_of_rank,
            replicas=np.array([int(self.replicas)]),
        )

    def cool(
        self, stage: Stage, *, moves: int, caps: tuple[float, float], penalty: tuple[float, float]
    ) -> None:
        """Anneals on a sample of the tokens; the price of excess load rises as it cools."""
        experts = self.layout.hosts.shape[1]
        _, count, top_k = self.tokens.expert_ids.shape
        sample = min(stage.sample, count)
        tokens = self.tokens if sample == count else first_tokens(self.tokens, sample, experts)
        flow = make_flow(tokens, self.machine, self.layout)
        scratch = make_scratch(flow, seed=self.seed + stage.steps)
        limits = self.limits(flow, *caps)
        heats = np.geomspace(stage.hot, stage.cold, stage.steps) * (sample * top_k / experts)
        prices = np.geomspace(*penalty, stage.steps)
        for heat, price in zip(heats, prices, strict=True):
            if self.is_late:
                return
            anneal(
                *(tokens, self.machine, self.layout, flow, limits, scratch),
                *(moves, float(heat), float(price)),
            )


def solve(search: Search, *, cap: float, node_cap: float, effort: float) -> None:
    """Anneals under caps a little below those asked for, so that they hold on other tokens."""
    layers, experts = search.layout.hosts.shape
    moves = max(200, int(MOVES_PER_EXPERT * layers * experts * effort))
    caps = (1 + (cap - 1) * HEADROOM, 1 + (node_cap - 1) * HEADROOM)
    for stage in STAGES:
        penalty = (LOW_PENALTY, HIGH_PENALTY if stage.sample == ALL else LOW_PENALTY)
        search.cool(stage, moves=moves, caps=caps, penalty=penalty)
