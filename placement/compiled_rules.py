"""The rules of `placement.rules`, compiled: for a runtime on CPUs, which asks at every layer.

Shapes: T tokens, K experts a token, E experts, W ranks, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.search.state import host_words, make_machine
from placement.search.walk import MAX_RANKS, route_layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.plan import PlacementPlan
    from placement.search.state import Machine


class CompiledRules:
    """A plan's `choose_ranks` and `next_owner` in one call, for at most `MAX_RANKS` ranks."""

    def __init__(self, plan: PlacementPlan, *, coherence_domain: int | None) -> None:
        """Rules for a plan; compiles them if this is the machine's first time.

        Args:
            plan: where experts are.
            coherence_domain: ranks that share keys and values; None: all.
        """
        machine = make_machine(plan.topology, domain=coherence_domain, intra=0, inter=0)
        self._words = host_words(plan.hosts())
        outlook = plan.outlook_table()
        self._machines = [
            machine
            if outlook is None
            else machine._replace(outlook=outlook[layer : layer + 1].astype(np.int32))
            for layer in range(plan.num_layers)
        ]
        self._from_home = machine
        nothing = np.empty((0, 1), dtype=np.int64)
        self.route(0, nothing, nothing[:, 0])

    def route(
        self, layer: int, expert_ids: NDArray[np.int64], owner: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What `choose_ranks` and `next_owner` say.

        Args:
            layer: index among the MoE layers.
            expert_ids: (T, K), by falling gate weight.
            owner: (T,).

        Returns:
            (T, K) ranks and (T,) next owners.
        """
        return self._route(layer, expert_ids, owner, self._machines[layer])

    def first_owner(
        self, foretold_ids: NDArray[np.int64], home: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """(T,) what `first_owner` says, of (T, K) foretold experts and (T,) homes."""
        return self._route(0, foretold_ids, home, self._from_home)[1]

    def _route(
        self,
        layer: int,
        expert_ids: NDArray[np.int64],
        owner: NDArray[np.int64],
        machine: Machine,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ranks = np.empty(expert_ids.shape, dtype=np.int64)
        next_owners = np.empty(len(owner), dtype=np.int64)
        route_layer(
            np.ascontiguousarray(owner),
            np.ascontiguousarray(expert_ids)[None],
            self._words[layer : layer + 1],
            machine,
            ranks,
            next_owners,
        )
        return ranks, next_owners

    @staticmethod
    def can_have(num_ranks: int) -> bool:
        """Whether a machine is small enough."""
        return num_ranks <= MAX_RANKS
