"""Where a search on tokens starts: a layout annealed on pair counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placement.search.caps import steered
from placement.search.pairs import Pairs, count_pairs, exchange_ranks, fill_pull, swap_experts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.search.caps import Caps
    from placement.search.pace import Pace
    from placement.search.state import Machine, Tokens

SWAPS_PER_EXPERT, LEAST_MOVES, MAX_COST = 200, 500, 16e6
STEPS, EXCHANGES_PER_SWAP, FEW_EXPERTS = 40, 0.05, 64
HOT, COLD = 1.0, 0.01
LOW_PRICE, HIGH_PRICE = 1.0, 16.0
FIRST_PRICE, HASTE = 4.0, 0.5
TRANSITION_WEIGHT = 0.3
TIME_SHARE, LAST_STEPS, AT_ONCE = 0.3, 2, 50_000


def anneal_pairs(
    tokens: Tokens,
    machine: Machine,
    *,
    num_experts: int,
    caps: Caps,
    seed: int,
    pace: Pace,
    effort: float = 1.0,
) -> NDArray[np.int64]:
    """(L, E) ranks that bring affine experts together, without replicas.

    For top-1 the weight of a transition is what it costs to leave the rank, so the value is exact.
    Short of time, it skips steps, but never the last ones.
    """
    pairs = make_pairs(tokens, machine, num_experts, caps)
    fill_pull(pairs)
    rng = np.random.default_rng(seed).integers(1, 2**63, size=1, dtype=np.uint64)
    layers, _, top_k = tokens.expert_ids.shape
    unit = float(tokens.weight.sum()) * top_k / num_experts
    most = MAX_COST / max(FEW_EXPERTS, num_experts)  # a swap costs as much as a layer has experts
    most = min(SWAPS_PER_EXPERT * layers * num_experts, most)
    exchanges = EXCHANGES_PER_SWAP * min(1.0, FEW_EXPERTS / num_experts) ** 2
    heats, over = np.geomspace(HOT, COLD, STEPS), np.geomspace(LOW_PRICE, HIGH_PRICE, STEPS)
    price = np.array([FIRST_PRICE, 0.0])
    with pace.phase("affinity, pairs", STEPS, share=TIME_SHARE):
        for step, heat in enumerate(heats * unit):
            effort_now = pace.step(effort, is_needed=step >= STEPS - LAST_STEPS)
            if effort_now == 0:
                continue
            price[1] = over[step]
            moves = max(LEAST_MOVES, int(most * effort_now))
            for piece in pace.pieces(moves, AT_ONCE):
                swap_experts(pairs, rng, piece, float(heat), price)
            for piece in pace.pieces(int(moves * exchanges), AT_ONCE // num_experts):
                exchange_ranks(pairs, rng, piece, float(heat))
            price[0] = steered(price[0], pairs.rank_load, caps.mean, HASTE)
    return pairs.rank_of


def make_pairs(tokens: Tokens, machine: Machine, num_experts: int, caps: Caps) -> Pairs:
    """Pair weights, loads and the linear layout; the pulls are still zero."""
    layers, _, top_k = tokens.expert_ids.shape
    width, nodes = len(machine.node_of_rank), len(machine.ranks_of_node)
    within = np.zeros((layers, num_experts, num_experts), dtype=np.float32)
    across = np.zeros((max(layers - 1, 1), num_experts, num_experts), dtype=np.float32)
    back = np.zeros_like(across)
    count_pairs(tokens, within, across, back)
    scale = np.float32(1.0 if top_k == 1 else TRANSITION_WEIGHT)
    across *= scale
    back *= scale
    rank_of = np.tile(np.arange(num_experts) * width // num_experts, (layers, 1))
    load = expert_load(tokens, num_experts)
    loads = zip(rank_of, load, strict=True)
    row, entry = machine.row_cost
    return Pairs(
        within=within,
        across=across,
        back=back,
        load=load,
        node_of_rank=machine.node_of_rank,
        node_share=np.array([entry / (row + entry)], dtype=np.float32),
        rank_of=rank_of,
        rank_pull=np.zeros((layers, num_experts, width), dtype=np.float32),
        node_pull=np.zeros((layers, num_experts, nodes), dtype=np.float32),
        rank_load=np.stack([np.bincount(r, weights=w, minlength=width) for r, w in loads]),
        cap=load.sum(axis=1) * (caps.rank / width),
        even=load.sum(axis=1) * (caps.even / width),
    )


def expert_load(tokens: Tokens, num_experts: int) -> NDArray[np.float64]:
    """(L, E) token load of every expert."""
    weight = np.repeat(tokens.weight, tokens.expert_ids.shape[2])
    loads = [
        np.bincount(ids.ravel(), weights=weight, minlength=num_experts) for ids in tokens.expert_ids
    ]
    return np.stack(loads)
