"""`exflow place`: a placement plan from a routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def place(
    traces: Annotated[list[Path], typer.Argument(help="Routing traces; several are merged.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks (GPUs) of a node.")] = 4,
    strategy: Annotated[
        str, typer.Option(help="linear, round_robin, random or affinity.")
    ] = "affinity",
    slots_per_rank: Annotated[
        int | None, typer.Option(help="Experts a rank can hold; more than needed: replicas.")
    ] = None,
    max_imbalance: Annotated[
        float | None, typer.Option(help="Cap on max / mean token load of the ranks of a layer.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same plan.")] = 0,
    protocol: Annotated[
        Literal["home", "coherent"], typer.Option(help="home or coherent.")
    ] = "coherent",
    coherence_domain: Annotated[
        int | None, typer.Option(help="Ranks that share KV caches; all unless given.")
    ] = None,
    effort: Annotated[float, typer.Option(help="How much search: 0.5 takes half as long.")] = 1.0,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which the best plan so far is taken.")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Also fit on half of the sequences and measure on the others.")
    ] = True,
) -> None:
    """Place the experts of a model: write a plan, print what it is worth on held-out tokens."""
    from placement.evaluation import compare_strategies, format_table
    from placement.interop.counts import COUNTS, LOAD_STRATEGIES, require_routing
    from placement.strategies import PlacementOptions, get_strategy
    from placement.topology import Topology
    from placement.trace import RoutingTrace, merge_traces

    options = PlacementOptions(
        seed=seed,
        max_imbalance=max_imbalance,
        protocol=protocol,
        coherence_domain=coherence_domain,
        effort=effort,
        time_limit=time_limit,
    )
    trace = merge_traces([RoutingTrace.load(path) for path in traces])
    if strategy.replace("-", "_") not in LOAD_STRATEGIES:
        require_routing(trace, f"strategy {strategy}")
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks_per_node)
    plan = get_strategy(strategy)(trace, topology, slots_per_rank=slots_per_rank, options=options)
    plan.save(output)
    typer.echo(
        f"{output}: {plan.strategy.name}, {topology.num_ranks} ranks, {plan.num_slots} slots"
    )
    if compare and trace.num_sequences > 1 and trace.phase != COUNTS:
        names = list(dict.fromkeys(["linear", "round_robin", strategy]))
        rows = compare_strategies(
            trace, topology, names, slots_per_rank=slots_per_rank, options=options
        )
        typer.echo("\nheld-out tokens (plans fitted on the other half of the sequences)")
        typer.echo(format_table(rows))
