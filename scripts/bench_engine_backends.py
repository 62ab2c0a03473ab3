"""Which all-to-all backends can profit from a plan, and by how much: docs/engines.md's table.

    python scripts/bench_engine_backends.py TRACE... --nodes 2 --ranks-per-node 4

Plans are fitted on half of the sequences and measured on the other half, under `home` (attention
data parallelism: what vLLM, SGLang and TensorRT-LLM do). Copies are hidden vectors a token sends
to its experts, summed over layers; as many partial sums return. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from placement.rules import walk_layers
from placement.strategies import PlacementOptions, get_strategy
from placement.topology import Topology
from placement.trace import RoutingTrace
from placement.traffic import count_traffic

if TYPE_CHECKING:
    from placement.plan import PlacementPlan


def copies(trace: RoutingTrace, plan: PlacementPlan) -> dict[str, float]:
    """Copies a token sends, by what the backend sends once."""
    traffic = count_traffic(trace, plan, protocol="home")
    rows = traffic.rows_per_token()
    return {
        "expert": remote_choices(trace, plan),
        "rank": rows["dispatch"],
        "node": rows["inter_node_dedup"] / 2,
        "gather": float(plan.num_layers * (plan.num_ranks - 1)),
        "imbalance": traffic.imbalance()["mean"],
    }


def remote_choices(trace: RoutingTrace, plan: PlacementPlan) -> float:
    """Chosen experts a token that run away from its home: one copy each without dedup."""
    owner = (trace.sequence_ids % plan.num_ranks).astype(np.int64)
    steps = walk_layers(
        trace.expert_ids.astype(np.int64),
        owner,
        plan.hosts().astype(np.int64),
        node_of_rank=plan.topology.node_of_rank,
        domain_of_rank=plan.topology.domain_of_rank(1),
    )
    remote = sum(int((step.rank_of_choice != step.owner[:, None]).sum()) for step in steps)
    return remote / trace.num_tokens


def measure(path: Path, topology: Topology, effort: float) -> dict[str, dict[str, float]]:
    """Copies of linear and affinity placement, the latter also with 25% replicas, of a trace."""
    fit, held_out = RoutingTrace.load(path).split()
    slots = -(-fit.num_experts // topology.num_ranks)
    options = PlacementOptions(protocol="home", effort=effort)
    wanted = {
        "linear": ("linear", None),
        "affinity": ("affinity", slots),
        "affinity, 25% replicas": ("affinity", slots + slots // 4),
    }
    print(f"{path.stem}, {topology.num_nodes} x {topology.ranks_per_node} ranks: copies a token")
    results = {}
    for name, (strategy, share) in wanted.items():
        plan = get_strategy(strategy)(fit, topology, slots_per_rank=share, options=options)
        results[name] = copies(held_out, plan)
        cells = "  ".join(f"{kind} {value:7.2f}" for kind, value in results[name].items())
        print(f"  {name:24} {cells}", flush=True)
    return results


def main() -> None:
    """Print the table and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=4)
    parser.add_argument("--effort", type=float, default=1.0)
    args = parser.parse_args()
    topology = Topology(num_nodes=args.nodes, ranks_per_node=args.ranks_per_node)
    results = {path.stem: measure(path, topology, args.effort) for path in args.traces}
    print(json.dumps({"nodes": args.nodes, "ranks": topology.num_ranks, "copies": results}))


if __name__ == "__main__":
    main()
