"""Where tokens start, where their experts run, who owns them next, by whom their rows pass.

What planner and runtime agree on.

The rules take NumPy arrays or torch tensors: only operations that both libraries spell alike are
used. `walk_layers`, the planner's own, takes NumPy arrays.

Shapes: T tokens, K experts a token, E experts, W ranks, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Array: TypeAlias = Any  # a NumPy array or a torch tensor


def choose_ranks(hosts: Array, expert_ids: Array, owner: Array, node_of_rank: Array) -> Array:
    """The rank that runs each chosen expert of each token.

    An expert with one copy runs there. Then, in order of gate weight, a replicated expert runs on
    the owner if it has a copy, else on a rank already chosen for the token, else on the owner's
    node, else on a node already visited; ties go to the first copy from rank (owner + expert)
    upwards, modulo the number of ranks, which spreads load.

    Args:
        hosts: int64 (E, W), 1 where the rank holds a copy.
        expert_ids: int64 (T, K), by falling gate weight.
        owner: int64 (T,).
        node_of_rank: int64 (W,).

    Returns:
        int64 (T, K) ranks.

    >>> hosts = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]])   # expert 1 is on ranks 1 and 2
    >>> choose_ranks(hosts, np.array([[1, 2]]), np.array([0]), np.zeros(3, int)).tolist()
    [[2, 2]]
    """
    num_ranks = hosts.shape[1]
    ranks = _range_like(owner, num_ranks)
    copies = hosts.sum(axis=1)
    chosen_rank = hosts.argmax(axis=1)[expert_ids]
    is_owner = owner[:, None] == ranks
    on_owner_node = node_of_rank[owner][:, None] == node_of_rank
    is_fixed = copies[expert_ids] == 1
    chosen = ((chosen_rank[:, :, None] == ranks) & is_fixed[:, :, None]).any(axis=1)
    visited = _on_same_node(chosen, node_of_rank)
    turn = num_ranks - (ranks - ranks[:, None]) % num_ranks
    near_owner = (is_owner * 8 + on_owner_node * 2) * (num_ranks + 1)
    for slot in range(expert_ids.shape[1]):
        experts = expert_ids[:, slot]
        nearness = near_owner + (chosen * 4 + visited * 1) * (num_ranks + 1)
        first = turn[(owner + experts) % num_ranks]
        best = (hosts[experts] * (nearness + first)).argmax(axis=1)
        chosen_rank[:, slot] = best
        chosen = chosen | (best[:, None] == ranks)
        visited = visited | (node_of_rank[best][:, None] == node_of_rank)
    return chosen_rank


def next_owner(
    rank_of_choice: Array, owner: Array, domain_of_rank: Array, outlook: Array | None = None
) -> Array:
    """The rank in the owner's coherence domain that runs most of the token's experts.

    With an outlook: of the ranks that run any of its experts, the one where the next layer costs
    least. All of them save one combine row; what they save at the next layer differs.
    Ties go to the present owner, then to the lowest rank; a token with no expert in its domain
    stays where it is.

    Args:
        rank_of_choice: int64 (T, K) from `choose_ranks`.
        owner: int64 (T,).
        domain_of_rank: int64 (W,).
        outlook: int64 (T, W) the plan's outlook, summed over the token's experts; None: without.

    Returns:
        int64 (T,).

    >>> next_owner(np.array([[2, 1, 2], [0, 1, 2]]), np.array([0, 1]), np.zeros(3, int)).tolist()
    [2, 1]
    """
    num_ranks = domain_of_rank.shape[0]
    ranks = _range_like(owner, num_ranks)
    experts_run = (rank_of_choice[:, :, None] == ranks).sum(axis=1)
    is_owner = (owner[:, None] == ranks) * 1
    in_domain = domain_of_rank[owner][:, None] == domain_of_rank
    if outlook is not None:
        may_own = in_domain * (experts_run > 0)
        preference = (outlook * 2 + is_owner) * num_ranks + (num_ranks - 1 - ranks)
        return (2 * may_own * (preference + 1) + is_owner).argmax(axis=1)
    preference = experts_run * 2 + is_owner
    return (in_domain * (preference * num_ranks + (num_ranks - 1 - ranks) + 1)).argmax(axis=1)


def first_owner(
    hosts: Array,
    foretold_ids: Array | None,
    home: Array,
    node_of_rank: Array,
    domain_of_rank: Array,
) -> Array:
    """The rank where a token starts a decode step.

    Every rank of its coherence domain has its keys and values and knows the token, so it may start
    on any of them: on the one that would be the next owner, but for an outlook, after a layer like
    the first with the experts that this is foretold to choose. Where the foretelling is right, and
    home runs none of them, the first layer sends a row less.

    Args:
        hosts: int64 (E, W) of the first MoE layer.
        foretold_ids: int64 (T, K), see `RoutingTrace.foretold_ids`; None: tokens start at home.
        home: int64 (T,).
        node_of_rank: int64 (W,).
        domain_of_rank: int64 (W,); every rank its own domain is `home`.

    Returns:
        int64 (T,).

    >>> hosts = np.array([[1, 0], [0, 1], [1, 0]])
    >>> first_owner(hosts, np.array([[1], [2]]), np.array([0, 0]), np.zeros(2, int), np.zeros(2, int)).tolist()
    [1, 0]
    """
    if foretold_ids is None:
        return home
    ranks = _ranks_of(hosts, foretold_ids, home, node_of_rank)
    return next_owner(ranks, home, domain_of_rank)


def _ranks_of(hosts: Array, expert_ids: Array, owner: Array, node_of_rank: Array) -> Array:
    """`choose_ranks`, at once where no expert has copies."""
    if int(hosts.sum()) == len(hosts):
        return hosts.argmax(axis=1)[expert_ids]
    return choose_ranks(hosts, expert_ids, owner, node_of_rank)


def relays(runs: Array, end: Array, node_of_rank: Array) -> Array:
    """Which rank a row between `end` and each rank passes, where dispatch is hierarchical.

    On another node than `end`'s it is the one rank there that talks with `end` for the token: of
    those that run its experts the first from `end`'s place in its node upwards, modulo the ranks
    of a node, which spreads the work. On `end`'s own node it is the rank itself. So a token
    crosses to a node once, by a rank that needs it anyway, and there are as many rows as in flat
    dispatch.

    Args:
        runs: bool (T, W), whether a rank runs any of the token's experts.
        end: int64 (T,) the owner, or for partial sums the next owner.
        node_of_rank: int64 (W,).

    Returns:
        int64 (T, W); it means something where `runs` is true.

    >>> runs = np.array([[False, True, True, True]])
    >>> relays(runs, np.array([1]), np.array([0, 0, 1, 1])).tolist()[0][1:]
    [1, 3, 3]
    """
    num_ranks = node_of_rank.shape[0]
    ranks = _range_like(end, num_ranks)
    per_node = int((node_of_rank == node_of_rank[0]).sum())
    turn = per_node - (ranks - end[:, None]) % per_node
    shape = (end.shape[0], num_ranks // per_node, per_node)
    first = (runs * turn).reshape(shape).argmax(axis=2)[:, node_of_rank]
    is_near = (node_of_rank[end][:, None] == node_of_rank) * 1
    return is_near * ranks + (1 - is_near) * (node_of_rank * per_node + first)


def _range_like(array: Array, stop: int) -> Array:
    if isinstance(array, np.ndarray):
        return np.arange(stop)
    return array.new_ones(stop).cumsum(0) - 1


def _on_same_node(chosen: Array, node_of_rank: Array) -> Array:
    """(T, W) whether a chosen rank shares the node of each rank."""
    same_node = node_of_rank[:, None] == node_of_rank
    return (chosen * 1.0) @ (same_node * 1.0) > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One layer of a walk: where tokens stood, where their experts ran, where they went."""

    layer: int
    owner: NDArray[np.int64]
    rank_of_choice: NDArray[np.int64]
    next_owner: NDArray[np.int64]


def walk_layers(
    expert_ids: NDArray[np.int64],
    owner: NDArray[np.int64],
    hosts: NDArray[np.int64],
    *,
    node_of_rank: NDArray[np.int64],
    domain_of_rank: NDArray[np.int64],
    outlook: NDArray[np.int64] | None = None,
) -> Iterator[Step]:
    """Follow tokens through all layers.

    Args:
        expert_ids: (T, L, K).
        owner: (T,) owner at the first layer.
        hosts: (L, E, W), 1 where the rank holds a copy.
        node_of_rank: (W,).
        domain_of_rank: (W,); every rank its own domain is `home`.
        outlook: (L, E, W) of the plan, if it has one.
    """
    for layer, table in enumerate(hosts):
        experts = expert_ids[:, layer]
        ranks = _ranks_of(table, experts, owner, node_of_rank)
        ahead = None if outlook is None else outlook[layer][experts].sum(axis=1)
        moved = next_owner(ranks, owner, domain_of_rank, ahead)
        yield Step(layer=layer, owner=owner, rank_of_choice=ranks, next_owner=moved)
        owner = moved
