"""Every strategy on every machine, held-out: rows, load, bounds; the null, the shift, the scale.

    python scripts/bench_placement.py TRACE... --json                 the table
    python scripts/bench_placement.py --scale deepseek-v3 --ranks 64  time and memory at scale
    python scripts/bench_placement.py --growth                        time against each size

Each trace is split by sequence: plans are fitted on one half and measured on the other. Whether
its domains count the same in affinity's plans is decided on the fitting half alone. The last line
of stdout is one JSON object; `-o DIR` keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from placement_scale import SCALES, measure_growth, measure_scale

from placement.bounds import lower_bound
from placement.domains import compare_weights, domain_shift, domains_of, even_weights
from placement.evaluation import bootstrap_change, evaluate_null, measure
from placement.homing import choose_homes
from placement.strategies import PlacementOptions, StrategyError, get_strategy
from placement.topology import Topology
from placement.trace import RoutingTrace
from placement.traffic import count_traffic, crossing_rate

BASELINES = ("linear", "round_robin", "random", "balanced", "metis", "moetuner", "exflow_milp")
MACHINES = ((1, 4), (1, 8), (2, 2), (2, 4))
CAPS = {"gptoss20b_decode": {4: 1.10, 8: 1.15}}
DEFAULT_CAP = 1.15
MEAN_SHARES = (1.0, 0.85, 0.7)
HALVINGS, EVENEST, FOLDS = 8, 1.005, 10
FRONTIER = (1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)


def main() -> None:
    """Run what was asked for, print one JSON line at the end."""
    args = parse_arguments()
    if args.growth:
        result = measure_growth(seed=args.seed, effort=args.effort)
    elif args.scale:
        result = measure_scale(
            args.scale, args.ranks, args.tokens, seed=args.seed, effort=args.effort
        )
    else:
        result = run_traces(args)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = Path(os.environ.get("EXFLOW_TRACES", "../shared/data/traces"))
    parser.add_argument(
        "traces", nargs="*", type=Path, default=sorted(folder.glob("*.safetensors"))
    )
    parser.add_argument("--milp-seconds", type=float, default=120.0)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--mean-shares",
        default=",".join(map(str, MEAN_SHARES)),
        help="mean imbalances to ask affinity for, as shares of the cap's excess over 1",
    )
    parser.add_argument("--strategies", default=",".join((*BASELINES, "affinity")))
    parser.add_argument(
        "--parts", default="cells,crossing,null,shift,homing,frontier", help="what to run"
    )
    parser.add_argument("--scale", choices=sorted(SCALES))
    parser.add_argument("--growth", action="store_true", help="seconds against each size")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="no tables, only the last line")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if not args.scale and not args.growth and not args.traces:
        parser.error(f"no traces in {folder}; name some, or set EXFLOW_TRACES")
    return args


def run_traces(args: argparse.Namespace) -> dict[str, Any]:
    """All parts on all traces."""
    result: dict[str, Any] = {"cells": []}
    for path in args.traces:
        trace = RoutingTrace.load(path)
        for part in args.parts.split(","):
            say(f"{path.stem}: {part}")
            for row in PARTS[part](trace, path.stem, args):
                result.setdefault(part, []).append(row)
                if not args.json:
                    print(json.dumps(row), flush=True)
                keep(result, args)
    return result


def keep(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Save what is done so far."""
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "partial.json").write_text(json.dumps(result))


def cells(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """Every strategy on every machine, with and without spare slots."""
    fit, held_out = trace.split()
    is_even = "affinity" in args.strategies and should_be_even(fit, name)
    for nodes, per_node in MACHINES:
        topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
        ranks = topology.num_ranks
        base = -(-trace.num_experts // ranks)
        cap = CAPS.get(name, {}).get(ranks, DEFAULT_CAP)
        for slots, strategies in (
            (base, (*BASELINES, "affinity")),
            (base * 5 // 4, ("balanced", "affinity")),
        ):
            bound = lower_bound(held_out, topology, slots_per_rank=slots)
            for strategy in strategies:
                if strategy not in args.strategies.split(","):
                    continue
                is_ours = strategy == "affinity"
                for asked in means_up_to(cap, args) if is_ours else [cap]:
                    options = PlacementOptions(
                        seed=args.seed,
                        max_imbalance=None if is_ours else cap,
                        mean_imbalance=asked if is_ours else None,
                        effort=args.effort,
                        time_limit=None if is_ours else args.milp_seconds,
                        token_weights=even_weights(domains_of(fit))
                        if is_ours and is_even
                        else None,
                    )
                    row = cell(fit, held_out, topology, slots, strategy, options, name)
                    yield {**row, "cap": asked, "bound": round(bound.rows_per_token, 3)}


def should_be_even(fit: RoutingTrace, name: str) -> bool:
    """Whether domains should count the same: fewer rows times imbalance on halves of the half."""
    options = PlacementOptions(effort=0.5)
    found = compare_weights(fit, Topology(num_nodes=1, ranks_per_node=8), options=options)
    worth = {way: row["rows"] * row["imbalance"] for way, row in found.items()}
    say(f"{name}: weights of domains, on the fitting half: {json.dumps(found)}")
    return worth["even"] < worth["none"]


def means_up_to(cap: float, args: argparse.Namespace) -> list[float]:
    """Mean imbalances to ask for: the load of tokens not seen may be less even than foreseen."""
    return [round(1 + (cap - 1) * float(share), 4) for share in args.mean_shares.split(",")]


def cell(
    fit: RoutingTrace,
    held_out: RoutingTrace,
    topology: Topology,
    slots: int,
    strategy: str,
    options: PlacementOptions,
    name: str,
) -> dict[str, Any]:
    """One strategy on one machine."""
    start = time.perf_counter()
    try:
        plan = get_strategy(strategy)(fit, topology, slots_per_rank=slots, options=options)
    except StrategyError as error:
        return {
            "trace": name,
            "num_nodes": topology.num_nodes,
            "ranks_per_node": topology.ranks_per_node,
            "slots_per_rank": slots,
            "strategy": strategy,
            "error": str(error),
        }
    seconds = time.perf_counter() - start
    figures = measure(held_out, plan)
    home = count_traffic(held_out, plan, protocol="home")
    linear = get_strategy("linear")(fit, topology)
    at_home = count_traffic(held_out, linear, protocol="home")
    change = bootstrap_change(held_out, at_home, count_traffic(held_out, plan))
    return {
        "trace": name,
        "num_nodes": topology.num_nodes,
        "ranks_per_node": topology.ranks_per_node,
        "slots_per_rank": slots,
        "strategy": strategy,
        "rows": round(figures["rows_per_token"]["total"], 3),
        "rows_home": round(home.rows_per_token()["total"], 3),
        "inter_node_rows": round(figures["rows_per_token"]["inter_node_dedup"], 3),
        "linear_home_rows": round(at_home.rows_per_token()["total"], 3),
        "linear_home_inter_node_rows": round(at_home.rows_per_token()["inter_node_dedup"], 3),
        "change": [round(change[key], 4) for key in ("change", "low", "high")],
        "imbalance_mean": round(figures["imbalance"]["mean"], 4),
        "imbalance_max": round(figures["imbalance"]["max"], 4),
        "node_imbalance": round(figures["node_imbalance"], 4),
        "crossing_rate": round(figures["crossing_rate"], 4),
        "seconds": round(seconds, 2),
    }


def halvings(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """The evenest plans without replicas, on several halvings of the sequences."""
    topology, slots = Topology(num_nodes=2, ranks_per_node=2), -(-trace.num_experts // 4)
    for halving in range(HALVINGS):
        fit, held_out = trace.split(seed=halving)
        for strategy in ("balanced", "moetuner", "affinity"):
            options = PlacementOptions(
                seed=args.seed, effort=args.effort, time_limit=args.milp_seconds
            )
            if strategy == "affinity":
                options = replace(options, mean_imbalance=EVENEST, time_limit=None)
            yield {
                "halving": halving,
                **cell(fit, held_out, topology, slots, strategy, options, name),
            }


def groups(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """Plans made for load alone, and affinity with their groups: as even, and fewer rows."""
    for nodes, per_node in MACHINES:
        topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
        slots = -(-trace.num_experts // topology.num_ranks)
        for halving in range(HALVINGS if (nodes, per_node) == (2, 2) else 1):
            fit, held_out = trace.split(seed=halving)
            for strategy in ("balanced", "moetuner"):
                options = PlacementOptions(seed=args.seed, time_limit=args.milp_seconds)
                where = {"halving": halving, "groups": strategy}
                yield {**where, **cell(fit, held_out, topology, slots, strategy, options, name)}
                start = get_strategy(strategy)(fit, topology, options=options)
                own = PlacementOptions(seed=args.seed, start=start, keep_groups=True)
                yield {**where, **cell(fit, held_out, topology, slots, "affinity", own, name)}


def crossing(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """The paper's metric: top-1 path, no load cap, no replicas; fitted and held-out tokens."""
    fit, held_out = trace.top1().split()
    for ranks in (4, 8):
        topology = Topology(num_nodes=1, ranks_per_node=ranks)
        slots = -(-trace.num_experts // ranks)
        bound = lower_bound(fit, topology, slots_per_rank=slots).rows_per_token
        for strategy in ("linear", "exflow_milp", "affinity"):
            start = time.perf_counter()
            plan = get_strategy(strategy)(fit, topology, options=without_cap(strategy, args))
            yield {
                "trace": name,
                "ranks": ranks,
                "strategy": strategy,
                "crossing_fit": round(crossing_rate(fit, plan), 4),
                "crossing_held_out": round(crossing_rate(held_out, plan), 4),
                "crossing_bound_fit": round(bound / (trace.num_layers - 1), 4),
                "seconds": round(time.perf_counter() - start, 1),
            }


def folds(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """The paper's metric on every sequence, by plans of the nine tenths it is not in."""
    top1 = trace.top1()
    sequences = np.unique(top1.sequence_ids)
    np.random.default_rng(args.seed).shuffle(sequences)
    tenths = [np.isin(top1.sequence_ids, part) for part in np.array_split(sequences, FOLDS)]
    for ranks in (4, 8):
        topology = Topology(num_nodes=1, ranks_per_node=ranks)
        for strategy in ("linear", "affinity"):
            start = time.perf_counter()
            fitted, held_out = [], []
            for tenth in tenths:
                fit = top1.select(~tenth)
                plan = get_strategy(strategy)(fit, topology, options=without_cap(strategy, args))
                fitted.append(crossing_rate(fit, plan))
                held_out.append(crossing_rate(top1.select(tenth), plan))
            yield {
                "trace": name,
                "ranks": ranks,
                "strategy": strategy,
                "crossing_fit": round(float(np.mean(fitted)), 4),
                "crossing_held_out": round(
                    float(np.average(held_out, weights=[tenth.sum() for tenth in tenths])), 4
                ),
                "least": round(min(held_out), 4),
                "most": round(max(held_out), 4),
                "seconds": round(time.perf_counter() - start, 1),
            }


def without_cap(strategy: str, args: argparse.Namespace) -> PlacementOptions:
    """No cap on the load; a time limit only for what does not end by itself."""
    return PlacementOptions(
        seed=args.seed,
        max_imbalance=float("inf"),
        effort=args.effort,
        time_limit=None if strategy == "affinity" else args.milp_seconds,
    )


def null(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """The gain where tokens are shuffled in each layer."""
    options = PlacementOptions(seed=args.seed, effort=args.effort)
    change = evaluate_null(trace, Topology(num_nodes=1, ranks_per_node=4), options=options)
    yield {"trace": name, **{key: round(value, 4) for key, value in change.items()}}


def shift(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """Plans fitted on one domain, measured on the others."""
    options = PlacementOptions(seed=args.seed, effort=args.effort)
    yield {
        "trace": name,
        **domain_shift(trace, Topology(num_nodes=1, ranks_per_node=4), options=options),
    }


def homing(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """Rows under `home` with request homes chosen from the first tokens."""
    fit, held_out = trace.split()
    topology = Topology(num_nodes=1, ranks_per_node=4)
    options = PlacementOptions(seed=args.seed, effort=args.effort, protocol="home")
    plan = get_strategy("affinity")(fit, topology, options=options)
    for first in (0, 8, 32, 128, None):
        homes = None if first == 0 else choose_homes(held_out, plan, first_tokens=first)
        traffic = count_traffic(held_out, plan, protocol="home", homes=homes)
        yield {
            "trace": name,
            "first_tokens": first,
            "rows": round(traffic.rows_per_token()["total"], 3),
        }


def frontier(trace: RoutingTrace, name: str, args: argparse.Namespace) -> Any:
    """Rows against imbalance, with and without replicas."""
    fit, held_out = trace.split()
    topology = Topology(num_nodes=1, ranks_per_node=4)
    base = -(-trace.num_experts // 4)
    for slots in (base, base * 5 // 4):
        for cap in FRONTIER:
            options = PlacementOptions(seed=args.seed, effort=args.effort, max_imbalance=cap)
            try:
                plan = get_strategy("affinity")(
                    fit, topology, slots_per_rank=slots, options=options
                )
            except StrategyError:
                continue
            traffic = count_traffic(held_out, plan)
            yield {
                "trace": name,
                "slots_per_rank": slots,
                "cap": cap,
                "rows": round(traffic.rows_per_token()["total"], 3),
                "imbalance_mean": round(traffic.imbalance()["mean"], 4),
            }


PARTS = {
    "cells": cells,
    "halvings": halvings,
    "groups": groups,
    "crossing": crossing,
    "folds": folds,
    "null": null,
    "shift": shift,
    "homing": homing,
    "frontier": frontier,
}


def say(line: str) -> None:
    """Progress, to stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
