"""What a user can ask of any strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.errors import UserError
from placement.plan import PlacementPlan
from placement.timing import protocol_for
from placement.traffic import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from threading import Event

    import numpy as np
    from numpy.typing import NDArray

    from placement.topology import Topology
    from placement.trace import RoutingTrace


INTRA_NODE_COST = 0.11
MOST_EFFORT = 10_000


class StrategyError(UserError):
    """Options that no placement can satisfy, or an unknown strategy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementOptions:
    """Options of a placement; a strategy ignores those that mean nothing to it.

    Attributes:
        seed: of every random choice; the same seed gives the same plan on any machine.
        max_imbalance: cap on max / mean token load over the ranks of a layer; None: the strategy's.
        mean_imbalance: what the mean of that over layers should be at most on tokens not seen; None:
            `max_imbalance`. With a cap above it, layers share their unevenness as serves rows best.
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None means all.
        effort: how much search; 1 is the default, half takes half the time.
        time_limit: seconds that affinity's search or an integer program may take; None: no limit
            for affinity, the program's own for the others.
        interrupt: once set, affinity ends its search as soon as it can; None: never.
        shows_progress: whether affinity shows a bar on stderr if that is a terminal.
        backend: whose rows are counted, of `placement.timing.BACKENDS`; all but exflow bring
            tokens home.
        intra_node_cost: cost of a row inside a node, where a row between nodes costs 1.
        start: a plan to start from; None: a fresh one.
        max_moves: copies that may be where `start` has none; None: any number.
        keep_groups: the experts that share a rank in `start` go on sharing one, only which one it is
            may change; without copies, loads stay as they are.
        spread: copies of an expert must be on different nodes.
        token_weights: (tokens,) what each token of the trace counts for; None: 1.
    """

    seed: int = 0
    max_imbalance: float | None = None
    mean_imbalance: float | None = None
    protocol: Protocol = "coherent"
    coherence_domain: int | None = None
    effort: float = 1.0
    time_limit: float | None = None
    interrupt: Event | None = None
    shows_progress: bool = False
    backend: str = "exflow"
    intra_node_cost: float = INTRA_NODE_COST
    start: PlacementPlan | None = None
    max_moves: int | None = None
    keep_groups: bool = False
    spread: bool = False
    token_weights: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            msg = f"unknown protocol {self.protocol!r}; choose home or coherent"
            raise StrategyError(msg)
        protocol_for(self.backend, self.protocol)
        for name in ("max_imbalance", "mean_imbalance"):
            value = getattr(self, name)
            if value is not None and not value >= 1.0:
                msg = f"{name} is max / mean load, at least 1, got {value}"
                raise StrategyError(msg)
        if not 0 < self.effort <= MOST_EFFORT or not 0 <= self.intra_node_cost <= 1:
            msg = (
                f"effort must be a number above 0, at most {MOST_EFFORT}, and intra_node_cost from "
                f"0 to 1, got {self.effort} and {self.intra_node_cost}"
            )
            raise StrategyError(msg)
        if self.seed < 0:
            msg = f"seed must be a whole number from 0, got {self.seed}"
            raise StrategyError(msg)
        if self.time_limit is not None and not self.time_limit > 0:
            msg = f"time_limit is in seconds, above 0, got {self.time_limit}"
            raise StrategyError(msg)
        if self.max_moves is not None and (self.start is None or self.max_moves < 0):
            msg = "max_moves counts from a plan: give one with --from, and a number from 0"
            raise StrategyError(msg)

        if self.keep_groups:
            self._check_groups()

    def _check_groups(self) -> None:
        """Renaming ranks saves rows where an owner may move to any of them."""
        if self.start is None or self.max_moves is not None:
            msg = "keep_groups takes the groups of a plan: give one with --from, without max_moves"
            raise StrategyError(msg)
        if self.protocol == "home" or self.coherence_domain is not None:
            msg = (
                "keep_groups only decides which rank a group is on, which saves rows where owners "
                "may move to any rank: use --protocol coherent without --coherence-domain"
            )
            raise StrategyError(msg)

    @property
    def domain_size(self) -> int | None:
        """The coherence domain: one rank under `home`."""
        return 1 if self.protocol == "home" else self.coherence_domain

    def summary(self, **more: float | None) -> dict[str, object]:
        """What a plan's file says about how it was made."""
        named = {
            "protocol": self.protocol,
            "coherence_domain": self.coherence_domain,
            "backend": None if self.backend == "exflow" else self.backend,
            "intra_node_cost": None
            if self.intra_node_cost == INTRA_NODE_COST
            else round(self.intra_node_cost, 6),
            "max_imbalance": self.max_imbalance,
            "mean_imbalance": self.mean_imbalance,
            "effort": self.effort,
            "max_moves": self.max_moves,
            "keep_groups": self.keep_groups or None,
            "spread": self.spread or None,
            **more,
        }
        return {name: value for name, value in named.items() if value is not None}


Place = Callable[..., PlacementPlan]


def slots_per_rank_for(trace: RoutingTrace, topology: Topology, slots_per_rank: int | None) -> int:
    """The slots of a rank: as asked, or as few as hold every expert once.

    Raises:
        StrategyError: if the slots cannot hold all experts.
    """
    needed = -(-trace.num_experts // topology.num_ranks)
    if slots_per_rank is None:
        return needed
    if slots_per_rank < needed:
        msg = (
            f"{topology.num_ranks} ranks of {slots_per_rank} slots cannot hold "
            f"{trace.num_experts} experts; use --slots-per-rank {needed} or more"
        )
        raise StrategyError(msg)
    return min(slots_per_rank, trace.num_experts)
