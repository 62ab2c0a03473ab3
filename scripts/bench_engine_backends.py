"""What engines' all-to-all backends send under each plan: rows inside nodes and between them.

    python scripts/bench_engine_backends.py TRACE... --nodes 2 --ranks-per-node 4

Plans are fitted for each backend on half of the sequences and measured on the other half, under
`home`, with and without 25% more slots. Rows are those of a token over all layers, both ways. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.evaluation import measure
from placement.strategies import PlacementOptions, StrategyError, get_strategy
from placement.topology import Topology
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKENDS = ("deepep-v2", "nccl-ep", "deepep-ll", "agrs")
MORE_SLOTS = 1.25


def main() -> None:
    """Print a table for each trace and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=4)
    parser.add_argument("--effort", type=float, default=1.0)
    args = parser.parse_args()
    topology = Topology(num_nodes=args.nodes, ranks_per_node=args.ranks_per_node)
    results = {}
    for path in args.traces:
        print(f"{path.stem}: backend, plan, rows inside nodes, between nodes, load max / mean")
        results[path.stem] = list(rows_of(path, topology, args.effort))
    print(json.dumps({"nodes": args.nodes, "ranks": topology.num_ranks, "rows": results}))


def rows_of(path: Path, topology: Topology, effort: float) -> Iterator[dict[str, Any]]:
    """Every backend with every plan, printed and returned."""
    fit, held_out = RoutingTrace.load(path).split()
    slots = -(-fit.num_experts // topology.num_ranks)
    more = int(slots * MORE_SLOTS)
    plans = {
        "linear": ("linear", slots),
        "affinity": ("affinity", slots),
        "balanced, 25% more slots": ("balanced", more),
        "affinity, 25% more slots": ("affinity", more),
    }
    for backend in BACKENDS:
        options = PlacementOptions(protocol="home", backend=backend, effort=effort)
        for name, (strategy, share) in plans.items():
            try:
                plan = get_strategy(strategy)(fit, topology, slots_per_rank=share, options=options)
            except StrategyError as error:
                print(f"  {backend:10} {name:26} {error}", flush=True)
                yield {"backend": backend, "plan": name, "error": str(error)}
                continue
            figures = measure(held_out, plan, protocol="home", backend=backend)
            sent, load = figures["sent"], figures["imbalance"]["mean"]
            cells = f"{sent['intra']:8.2f} {sent['inter']:8.2f} {load:6.3f}"
            print(f"  {backend:10} {name:26} {cells}", flush=True)
            yield {"backend": backend, "plan": name, **sent, "imbalance": load}


if __name__ == "__main__":
    main()
