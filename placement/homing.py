"""Request homing: under `home` a request stays on one rank, so choose the rank by its first tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace


def choose_homes(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    first_tokens: int | None = None,
    max_imbalance: float = 1.1,
) -> NDArray[np.int64]:
    """(tokens,) home ranks under `home`, chosen for each request from its first tokens.

    A request saves two rows wherever its home runs one of a token's experts. Requests are assigned
    so that most is saved, with no rank taking more than `max_imbalance` times its share of them.

    Args:
        trace: the requests' tokens; `first_tokens` uses `positions` where the trace has them.
        plan: the plan, which the homes do not change.
        first_tokens: tokens looked at; None means all, an oracle.
        max_imbalance: cap on requests a rank over their mean.
    """
    sequences, index = np.unique(trace.sequence_ids, return_inverse=True)
    looked_at = _first_tokens(trace, index, first_tokens)
    hosts = plan.hosts()
    saved = np.zeros((len(sequences), plan.num_ranks))
    for layer in range(plan.num_layers):
        runs = hosts[layer][trace.expert_ids[looked_at, layer]].any(axis=1)
        np.add.at(saved, index[looked_at], runs)
    room = int(np.ceil(max_imbalance * len(sequences) / plan.num_ranks))
    _, slot = linear_sum_assignment(np.repeat(saved, room, axis=1), maximize=True)
    homes: NDArray[np.int64] = (slot // room)[index]
    return homes


def _first_tokens(
    trace: RoutingTrace, index: NDArray[np.int64], count: int | None
) -> NDArray[np.int64]:
    """Indices of the first `count` tokens of each sequence."""
    position = np.arange(trace.num_tokens) if trace.positions is None else trace.positions
    order = np.lexsort((position, index))
    starts = np.searchsorted(index[order], np.arange(index.max() + 1))
    rank_in_sequence = np.arange(trace.num_tokens) - starts[index[order]]
    return order if count is None else order[rank_in_sequence < count]
