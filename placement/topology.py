"""Topology: ranks in nodes, and the coherence domains ranks form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from placement.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TopologyError(UserError):
    """A topology that cannot exist."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks numbered node by node: node n holds ranks n * ranks_per_node onwards.

    >>> Topology(num_nodes=2, ranks_per_node=2).node_of_rank.tolist()
    [0, 0, 1, 1]
    """

    num_nodes: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.ranks_per_node < 1:
            msg = (
                f"a topology needs at least one node and one rank per node, got "
                f"{self.num_nodes} nodes of {self.ranks_per_node}"
            )
            raise TopologyError(msg)

    @property
    def num_ranks(self) -> int:
        """Ranks in the cluster."""
        return self.num_nodes * self.ranks_per_node

    @property
    def node_of_rank(self) -> NDArray[np.int64]:
        """(ranks,) the node of each rank."""
        return np.arange(self.num_ranks) // self.ranks_per_node

    def domain_of_rank(self, coherence_domain: int | None = None) -> NDArray[np.int64]:
        """(ranks,) the coherence domain of each rank; None means all ranks form one.

        Raises:
            TopologyError: if the domain size does not divide the number of ranks.
        """
        size = self.num_ranks if coherence_domain is None else coherence_domain
        if size < 1 or self.num_ranks % size:
            sizes = [d for d in range(1, self.num_ranks + 1) if self.num_ranks % d == 0]
            msg = (
                f"a coherence domain of {size} ranks does not divide {self.num_ranks} ranks; "
                f"choose one of {sizes}"
            )
            raise TopologyError(msg)
        return np.arange(self.num_ranks) // size
