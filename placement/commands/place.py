"""`exflow place`: a placement plan from a routing trace."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from placement.plan import PlacementPlan
    from placement.strategies import PlacementOptions
    from placement.topology import Topology
    from placement.trace import RoutingTrace

TABLE = ("linear", "round_robin", "balanced", "exflow_milp")
TABLE_SOLVER_SECONDS = 1.0
TABLE_EFFORT = 0.5

logger = logging.getLogger(__name__)


def place(
    traces: Annotated[list[Path], typer.Argument(help="Routing traces; several are merged.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks (GPUs) of a node.")] = 4,
    strategy: Annotated[
        str,
        typer.Option(
            help="linear, round_robin, random, balanced, exflow_milp, moetuner, metis or affinity."
        ),
    ] = "affinity",
    slots_per_rank: Annotated[
        int | None, typer.Option(help="Experts a rank can hold; more than needed: replicas.")
    ] = None,
    max_imbalance: Annotated[
        float | None, typer.Option(help="Cap on max / mean token load of the ranks of a layer.")
    ] = None,
    mean_imbalance: Annotated[
        float | None,
        typer.Option(
            help="What its mean over layers should be on other tokens; the cap if absent."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same plan.")] = 0,
    protocol: Annotated[
        Literal["home", "coherent"] | None,
        typer.Option(help="home or coherent; by default coherent, home for other backends."),
    ] = None,
    coherence_domain: Annotated[
        int | None, typer.Option(help="Ranks that share KV caches; all unless given.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Whose rows to save: exflow, deepep-v2, deepep-ll, nvlink-one-sided, nccl-ep or "
            "pplx."
        ),
    ] = "exflow",
    links: Annotated[
        Path | None,
        typer.Option(
            help="JSON with bandwidths of the links, which say what a row inside a node costs "
            "beside one between nodes; by default a ninth."
        ),
    ] = None,
    effort: Annotated[
        float,
        typer.Option(
            help="How much search: 0.5 takes half as long; from 4 on, affinity recombines several "
            "searches."
        ),
    ] = 1.0,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds for each search or solver. affinity leaves out steps to keep it, and does "
            "so on Ctrl-C, too; a large trace takes some seconds more."
        ),
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="A plan to start from instead of a fresh one.")
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option(help="With --from: copies that may be somewhere new.")
    ] = None,
    keep_groups: Annotated[
        bool,
        typer.Option(
            "--keep-groups",
            help="With --from: only which rank each of its groups of experts is on may change, "
            "so that loads stay as even as they are.",
        ),
    ] = False,
    spread: Annotated[
        bool, typer.Option("--spread", help="Keep the copies of an expert on different nodes.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="What each trace counts for in all, such as 3,1; even: the same; fair: as much as "
            "it takes for all to keep the same share of what each could gain (of one trace, even "
            "and fair mean its domains)."
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            help="Also fit on half of the sequences, at half the effort, and measure on the others."
        ),
    ] = True,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Add intervals, the null and the domain shift.")
    ] = False,
) -> None:
    """Place the experts of a model: write a plan, print what it is worth on held-out tokens."""
    from dataclasses import replace

    from placement.interop.counts import LOAD_STRATEGIES
    from placement.interrupts import best_on_interrupt
    from placement.merging import merge_traces
    from placement.output import check_writable
    from placement.plan import PlacementPlan
    from placement.strategies import PlacementOptions, StrategyError, get_strategy
    from placement.timing import Links, protocol_for
    from placement.topology import Topology
    from placement.trace import COUNTS, RoutingTrace
    from placement.traffic import require_routing

    if backend != "exflow" and (evaluate or weights == "fair"):
        msg = f"--evaluate and --weights fair count exflow's rows; leave them out with {backend}"
        raise StrategyError(msg)
    strategy = strategy.replace("-", "_")
    for_affinity = {
        "--mean-imbalance": mean_imbalance,
        "--from": start,
        "--max-moves": max_moves,
        "--keep-groups": keep_groups,
        "--spread": spread,
        "--weights": weights,
    }
    _check_strategy(strategy, for_affinity)
    if keep_groups and evaluate:
        msg = "--evaluate fits plans afresh: leave it out with --keep-groups"
        raise StrategyError(msg)
    check_writable(output, inputs=[*traces, links])
    parts = [RoutingTrace.load(path) for path in traces]
    trace = merge_traces(parts)
    if evaluate or strategy not in LOAD_STRATEGIES:
        require_routing(trace, f"strategy {strategy}")
    if evaluate and trace.num_sequences < 2:
        msg = "--evaluate fits plans on half of the sequences, the trace has one; leave it out"
        raise StrategyError(msg)
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks_per_node)
    options = PlacementOptions(
        seed=seed,
        max_imbalance=max_imbalance,
        mean_imbalance=mean_imbalance,
        protocol=protocol_for(backend, protocol),
        coherence_domain=coherence_domain,
        backend=backend,
        effort=effort,
        time_limit=time_limit,
        start=None if start is None else PlacementPlan.load(start),
        max_moves=max_moves,
        keep_groups=keep_groups,
        spread=spread,
        shows_progress=True,
    )
    if links is not None:
        options = replace(options, intra_node_cost=Links.load(links).intra_node_cost)
    find = get_strategy(strategy)
    with best_on_interrupt(can_hurry=strategy == "affinity") as interrupt:
        options = replace(options, interrupt=interrupt)
        if weights is not None:
            given = _token_weights(parts, weights, topology, slots_per_rank, options)
            options = replace(options, token_weights=given)
        plan = find(trace, topology, slots_per_rank=slots_per_rank, options=options)
    _write_plan(output, plan, trace, options)
    if interrupt.is_set():
        return
    if compare and trace.num_sequences > 1 and trace.phase != COUNTS:
        _show_table(strategy, trace, topology, slots_per_rank, options)
    if evaluate:
        _show_evaluation(trace, topology, slots_per_rank, options)


def _check_strategy(strategy: str, for_affinity: Mapping[str, object]) -> None:
    """No strategy but affinity heeds some options.

    Args:
        strategy: which.
        for_affinity: what was given for them.

    Raises:
        StrategyError: there is no such strategy, or one of them was given for another.
    """
    from placement.strategies import StrategyError, get_strategy

    get_strategy(strategy)
    given = [n for n, value in for_affinity.items() if value is not None and value is not False]
    if given and strategy != "affinity":
        msg = f"{', '.join(given)}: only for --strategy affinity; leave it out with {strategy}"
        raise StrategyError(msg)


def _token_weights(
    parts: list[RoutingTrace],
    weights: str,
    topology: Topology,
    slots_per_rank: int | None,
    options: PlacementOptions,
) -> NDArray[np.float32]:
    """(tokens,) weights whose total is the same for all traces but for the factors given."""
    import numpy as np

    from placement.domains import domains_of, even_weights, fair_weights
    from placement.merging import merge_traces
    from placement.strategies import StrategyError

    if weights in ("even", "fair"):
        groups = [np.full(part.num_tokens, index) for index, part in enumerate(parts)]
        trace, group = merge_traces(parts), np.concatenate(groups)
        if len(parts) == 1:
            group = domains_of(trace)
        if weights == "even":
            return even_weights(group)
        return fair_weights(trace, group, topology, slots_per_rank=slots_per_rank, options=options)
    try:
        factors = [float(word) for word in weights.split(",")]
    except ValueError:
        factors = []
    if len(factors) != len(parts) or not all(0 < f < float("inf") for f in factors):
        msg = (
            f"--weights needs a number above 0 for each of {len(parts)} traces, or the word even "
            f"or fair; got {weights!r}"
        )
        raise StrategyError(msg)
    tokens = sum(part.num_tokens for part in parts)
    shares = [f / sum(factors) * tokens / p.num_tokens for f, p in zip(factors, parts, strict=True)]
    return np.repeat(np.array(shares, np.float32), [part.num_tokens for part in parts])


def _write_plan(
    output: Path, plan: PlacementPlan, trace: RoutingTrace, options: PlacementOptions
) -> None:
    from placement.prediction import with_predictions

    plan = with_predictions(plan, trace, options)
    plan.save(output)
    typer.echo(
        f"{output}: {plan.strategy.name}, {plan.num_ranks} ranks, {plan.num_slots} slots\n"
        f"{_worth(plan, options.backend)}"
    )
    if plan.strategy.options.get("hurried"):
        logger.warning("the search was cut short: with more time the plan may be better")
    worst, cap = plan.predicted["imbalance"]["max"], options.max_imbalance
    if cap is not None and worst > cap:
        logger.warning(
            "max / mean load reaches %.4f at a layer, above --max-imbalance %s; only --strategy "
            "affinity heeds it",
            worst,
            cap,
        )


def _worth(plan: PlacementPlan, backend: str) -> str:
    """The plan's predictions in a line."""
    from placement.timing import unit_of

    evenness = f"imbalance {plan.predicted['imbalance']['mean']:.3f} on the trace itself"
    if "sent" not in plan.predicted:
        return f"{evenness}; it carries loads only, so no rows are counted"
    sent, bound = plan.predicted["sent"], plan.bound
    between = f" ({sent['inter']:.2f} between nodes)" if plan.topology.num_nodes > 1 else ""
    limit = (
        f"; no plan without a load cap goes below {bound['rows_per_token']:.2f} "
        f"({bound['method']} bound, gap {100 * bound['gap']:.0f}%)"
    )
    return (
        f"{sum(sent.values()):.2f} rows/token{between} at {evenness}"
        f"{limit if unit_of(backend) in ('node', 'rank') else ''}"
    )


def _show_table(
    strategy: str,
    trace: RoutingTrace,
    topology: Topology,
    slots_per_rank: int | None,
    options: PlacementOptions,
) -> None:
    from dataclasses import replace

    from placement.evaluation import compare_strategies, format_table

    effort = options.effort * TABLE_EFFORT
    fresh = replace(options, start=None, max_moves=None, keep_groups=False, effort=effort)
    quick = replace(fresh, time_limit=min(options.time_limit or 1e9, TABLE_SOLVER_SECONDS))
    baselines = [name for name in TABLE if name != strategy]
    common: dict[str, Any] = {"slots_per_rank": slots_per_rank}
    rows = compare_strategies(trace, topology, baselines, options=quick, **common)
    own = options if options.keep_groups else fresh
    rows += compare_strategies(trace, topology, [strategy], options=own, **common)
    typer.echo(
        "\nheld-out tokens (plans fitted on the other half of the sequences, with less search)"
    )
    typer.echo(format_table(rows))


def _show_evaluation(
    trace: RoutingTrace, topology: Topology, slots_per_rank: int | None, options: PlacementOptions
) -> None:
    from dataclasses import replace

    from placement.domains import domain_shift
    from placement.evaluation import bootstrap_change, evaluate_null
    from placement.strategies import get_strategy
    from placement.traffic import count_traffic

    fresh = replace(options, start=None, max_moves=None, token_weights=None)
    common: dict[str, Any] = {"slots_per_rank": slots_per_rank, "options": fresh}
    fit, held_out = trace.split()
    linear, affinity = (get_strategy(n)(fit, topology, **common) for n in ("linear", "affinity"))
    home = count_traffic(held_out, linear, protocol="home")
    here = count_traffic(
        held_out,
        affinity,
        protocol=options.protocol,
        coherence_domain=options.coherence_domain,
    )
    _show_change("affinity against linear, home", bootstrap_change(held_out, home, here))
    null = evaluate_null(trace, topology, **common)
    _show_change("null: affinity against balanced, top-1, tokens shuffled in each layer", null)
    shift = domain_shift(trace, topology, **common)
    for fitted, row in shift["kept"].items():
        kept = "  ".join(f"{name} {100 * share:.0f}%" for name, share in row.items())
        typer.echo(f"fitted on {fitted}: gain kept on {kept}")


def _show_change(what: str, change: dict[str, float]) -> None:
    low, high = 100 * change["low"], 100 * change["high"]
    typer.echo(f"{what}: {100 * change['change']:+.1f}% rows (95%: {low:+.1f} to {high:+.1f})")
