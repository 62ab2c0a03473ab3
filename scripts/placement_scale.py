"""Time and memory of `affinity` on traces of any size, made here with planted structure."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.evaluation import measure
from placement.strategies import PlacementOptions, get_strategy
from placement.topology import Topology
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from placement.plan import PlacementPlan

SCALES = {"deepseek-v3": (58, 256, 8)}
BASE = {"layers": 24, "experts": 64, "ranks": 8, "tokens": 20_000}
GROWTH = {
    "layers": (6, 12, 24, 48, 96),
    "experts": (16, 32, 64, 128, 256),
    "ranks": (2, 4, 8, 16, 32, 64),
    "tokens": (5_000, 20_000, 80_000, 320_000),
}


def measure_scale(
    name: str, ranks: int, tokens: int, *, seed: int, effort: float
) -> dict[str, Any]:
    """Seconds and memory from a trace to a plan, on planted structure plus noise."""
    layers, experts, top_k = SCALES[name]
    trace = planted_trace(tokens, layers, experts, top_k, seed=seed)
    plan, seconds = place_affinity(trace, ranks, seed=seed, effort=effort)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sample = trace.select(np.arange(min(5000, trace.num_tokens)))
    found = [
        {
            "trace": name,
            "num_nodes": plan.topology.num_nodes,
            "ranks_per_node": plan.topology.ranks_per_node,
            "slots_per_rank": -(-experts // ranks),
            "strategy": p.strategy.name,
            "rows": figures["rows_per_token"]["total"],
            "inter_node_rows": figures["rows_per_token"]["inter_node_dedup"],
            "imbalance_mean": figures["imbalance"]["mean"],
        }
        for p in (get_strategy("linear")(trace, plan.topology), plan)
        for figures in (measure(sample, p),)
    ]
    return {"cells": found, "seconds_total": round(seconds, 1), "peak_gb": round(peak, 2)}


def place_affinity(
    trace: RoutingTrace, ranks: int, *, seed: int, effort: float
) -> tuple[PlacementPlan, float]:
    """A plan for nodes of up to eight ranks, and the seconds it took."""
    topology = Topology(num_nodes=max(1, ranks // 8), ranks_per_node=min(8, ranks))
    slots = -(-trace.num_experts // ranks)
    start = time.perf_counter()
    options = PlacementOptions(seed=seed, effort=effort)
    plan = get_strategy("affinity")(trace, topology, slots_per_rank=slots, options=options)
    return plan, time.perf_counter() - start


def measure_growth(*, seed: int, effort: float) -> dict[str, Any]:
    """Seconds from a trace to a plan as one size grows and the others stay."""
    rows = []
    warm_up = planted_trace(500, 2, 16, 4, seed=seed)
    place_affinity(warm_up, 4, seed=seed, effort=effort)
    for size, values in GROWTH.items():
        for value in values:
            shape = {**BASE, size: value}
            trace = planted_trace(shape["tokens"], shape["layers"], shape["experts"], 4, seed=seed)
            seconds = place_affinity(trace, shape["ranks"], seed=seed, effort=effort)[1]
            rows.append({"size": size, **shape, "seconds": round(seconds, 2)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"growth": rows}


def planted_trace(tokens: int, layers: int, experts: int, top_k: int, *, seed: int) -> RoutingTrace:
    """Tokens of a topic favour some experts at each layer; half of the choices are noise."""
    rng = np.random.default_rng(seed)
    topics = experts // 4
    topic = rng.integers(0, topics, tokens)
    ids = np.empty((tokens, layers, top_k), dtype=np.int16)
    for layer in range(layers):
        liked = rng.random((topics, experts), dtype=np.float32)
        score = rng.random((tokens, experts), dtype=np.float32)
        score += 0.5 * (liked > 0.94)[topic]
        ids[:, layer] = np.argpartition(-score, top_k, axis=1)[:, :top_k]
    return RoutingTrace(
        expert_ids=ids,
        sequence_ids=np.sort(rng.integers(0, 200, tokens)).astype(np.int32),
        num_experts=experts,
        model="planted",
        layer_ids=tuple(range(layers)),
    )


if __name__ == "__main__":
    sys.exit("this measures for bench_placement.py: give that --scale deepseek-v3 or --growth")
