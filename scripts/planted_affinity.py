"""What plans save between two nodes: for a recorded trace, and for models with planted affinity.

    python scripts/planted_affinity.py TRACE --top-k 4 --strengths 2.2 2.4 2.6

The cluster benchmark's random models stand for large ones, so plans should save for them what they
save for a large model's recorded routing. Each is split by sequence, fitted on one half and measured
on the other, with the benchmark's caps and effort: rows between the nodes for a token and layer,
both ways, each node once, of tokens that start at home; and how many fewer they are where tokens
start with the experts foretold for them, if the trace has those (a profile does). Models are made
and profiled as in the benchmark. One line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from placement.strategies import PlacementOptions, StrategyError, get_strategy  # noqa: E402
from placement.topology import Topology  # noqa: E402
from placement.trace import RoutingTrace  # noqa: E402
from placement.traffic import count_traffic, crossing_rate  # noqa: E402
from scripts.bench_cluster import (  # noqa: E402
    EFFORT,
    LOADS,
    MAX_IMBALANCE,
    MORE_SLOTS,
    PLANTED,
    call,
    exflow,
    profile,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from placement.plan import PlacementPlan
    from placement.traffic import Traffic

MACHINES = ((2, 2), (2, 4))
STEPS = 17


def main() -> None:
    """Measure the trace, then a model of each strength."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, nargs="?", help="recorded routing of a large model")
    parser.add_argument("--top-k", type=int, choices=(1, 4), default=4)
    parser.add_argument("--strengths", type=float, nargs="*", help="default: the benchmark's")
    parser.add_argument("--layers", type=int, default=12, help="of planted models")
    parser.add_argument("--max-imbalance", type=float, help="default: the benchmark's")
    args = parser.parse_args()
    name = f"planted-top{args.top_k}"
    cap = args.max_imbalance or MAX_IMBALANCE[name]
    if args.trace:
        trace = RoutingTrace.load(args.trace)
        show(args.trace.stem, trace.top1() if args.top_k == 1 else trace, cap)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        exflow("sample-corpus", "-o", corpus)
        for strength in args.strengths or [PLANTED[name][2]]:
            trace = profiled(name, strength, args.layers, corpus, Path(folder))
            show(f"{name}, {args.layers} layers, strength {strength:g}", trace, cap)


def profiled(name: str, strength: float, layers: int, corpus: Path, folder: Path) -> RoutingTrace:
    """Decode's routing of a random model."""
    experts, top_k, _ = PLANTED[name]
    checkpoint, path = folder / f"{name}-{strength:g}", folder / "trace.safetensors"
    routing = ("--num-experts", experts, "--top-k", top_k, "--strength", strength)
    script = ROOT / "scripts/planted_model.py"
    call([sys.executable, script, checkpoint, "--num-layers", layers, *routing])
    profile(checkpoint, corpus, path, prompt_tokens=LOADS[name][1], steps=STEPS)
    return RoutingTrace.load(path)


def show(title: str, trace: RoutingTrace, cap: float) -> None:
    """One line for each machine and number of slots."""
    for row in measure(trace, cap):
        print(json.dumps({"routing": title, **row}), flush=True)


def measure(trace: RoutingTrace, cap: float) -> Iterator[dict[str, Any]]:
    """Rows between nodes on the half that plans were not fitted on."""
    from_home = replace(trace, foretold_ids=None)
    for nodes, ranks_per_node in MACHINES:
        topology = Topology(num_nodes=nodes, ranks_per_node=ranks_per_node)
        fit, held_out = from_home.split()
        linear = get_strategy("linear")(fit, topology)
        home = count_traffic(held_out, linear, protocol="home")
        before = home.rows_per_token()["inter_node_dedup"] / trace.num_layers
        row = {
            "nodes": nodes,
            "ranks_per_node": ranks_per_node,
            "home_linear": round(before, 3),
            "crossing_linear": round(crossing_rate(held_out, linear), 3),
        }
        for slots in slot_counts(trace.num_experts, topology.num_ranks):
            found = {**row, "slots_per_rank": slots}
            try:
                plan, traffic = place(from_home, topology, slots, cap)
                rows = traffic.rows_per_token()
                found |= {
                    "coherent_affinity": round(rows["inter_node_dedup"] / trace.num_layers, 3),
                    "change": round(rows["inter_node_dedup"] / trace.num_layers / before - 1, 3),
                    "imbalance_mean": round(traffic.imbalance()["mean"], 3),
                    "crossing": round(crossing_rate(held_out, plan), 3),
                }
                if trace.foretold_ids is not None:
                    started = place(trace, topology, slots, cap)[1].rows_per_token()
                    found["change_by_start"] = {
                        kind: round(started[kind] / max(rows[kind], 1e-9) - 1, 3)
                        for kind in ("total", "inter_node_dedup")
                    }
            except StrategyError as error:
                found["error"] = str(error)
            yield found


def place(
    trace: RoutingTrace, topology: Topology, slots: int, cap: float
) -> tuple[PlacementPlan, Traffic]:
    """A plan fitted on one half, and what it costs the other."""
    fit, held_out = trace.split()
    options = PlacementOptions(max_imbalance=cap, effort=EFFORT)
    plan = get_strategy("affinity")(fit, topology, slots_per_rank=slots, options=options)
    return plan, count_traffic(held_out, plan)


def slot_counts(experts: int, ranks: int) -> list[int]:
    """Without replicas and with the benchmark's."""
    base, more = math.ceil(experts / ranks), math.ceil(experts * MORE_SLOTS / ranks)
    return sorted({base, more})


if __name__ == "__main__":
    main()
