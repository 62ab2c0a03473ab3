"""`exflow simulate`: what plans cost on a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from placement.plan import PlacementPlan
    from placement.timing import Links, Shape
    from placement.trace import RoutingTrace


def simulate(
    trace: Annotated[Path, typer.Argument(help="Routing trace to count on.")],
    plans: Annotated[list[Path], typer.Argument(help="Plans to compare.")],
    protocol: Annotated[
        Literal["home", "coherent"] | None,
        typer.Option(help="home or coherent; by default coherent, home for other backends."),
    ] = None,
    coherence_domain: Annotated[
        int | None, typer.Option(help="Ranks that share KV caches; all unless given.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Elements of a row; needed for bytes.")
    ] = None,
    kv_elements: Annotated[
        int | None,
        typer.Option(min=0, help="K and V elements of a token and layer; needed for bytes."),
    ] = None,
    element_bytes: Annotated[int, typer.Option(min=1, help="Bytes of an element.")] = 2,
    backend: Annotated[
        str | None,
        typer.Option(help="Times for a backend: exflow, deepep-v2, deepep-ll, agrs, ..."),
    ] = None,
    links: Annotated[
        Path | None, typer.Option(help="JSON with latencies and bandwidths of the links.")
    ] = None,
    tokens_per_rank: Annotated[int, typer.Option(min=1, help="Tokens of a rank in a step.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Count the rows, the load and the bytes of plans on a trace; advise on a backend."""
    from placement.evaluation import format_table, measure
    from placement.plan import PlacementPlan
    from placement.timing import Links, Shape, protocol_for
    from placement.trace import RoutingTrace

    sender = backend or "exflow"
    protocol = protocol_for(sender, protocol)
    routing = RoutingTrace.load(trace)
    loaded = [PlacementPlan.load(path) for path in plans]
    rows = [
        {
            "plan": str(path),
            **measure(
                routing,
                plan,
                protocol=protocol,
                coherence_domain=coherence_domain,
                backend=sender,
                row_bytes=None if hidden_size is None else hidden_size * element_bytes,
                kv_bytes=None if kv_elements is None else kv_elements * element_bytes,
            ),
        }
        for path, plan in zip(plans, loaded, strict=True)
    ]
    result: dict[str, Any] = {"trace": str(trace), "protocol": protocol, "plans": rows}
    if backend is not None:
        shape = Shape(
            hidden_size=hidden_size or 4096,
            kv_elements=2048 if kv_elements is None else kv_elements,
            element_bytes=element_bytes,
            tokens_per_rank=tokens_per_rank,
        )
        speeds = Links() if links is None else Links.load(links)
        result["advice"] = _advice(routing, plans, loaded, backend, shape, speeds)
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(format_table(rows))
    for line in _advice_lines(result.get("advice")):
        typer.echo(line)


def _advice(
    trace: RoutingTrace,
    paths: Sequence[Path],
    plans: Sequence[PlacementPlan],
    backend: str,
    shape: Shape,
    links: Links,
) -> dict[str, Any]:
    from placement.timing import advise, why_no_gain

    reason = why_no_gain(backend, has_copies=any(plan.has_replicas for plan in plans))
    return {
        "backend": backend,
        "gain_possible": reason is None,
        "reason": reason,
        "plans": [
            {
                "plan": str(path),
                "choices": advise(trace, plan, backend=backend, shape=shape, links=links),
            }
            for path, plan in zip(paths, plans, strict=True)
        ],
    }


def _advice_lines(advice: dict[str, Any] | None) -> list[str]:
    if advice is None:
        return []
    lines = [f"\n{advice['backend']}, microseconds a step on the wire, the fastest first"]
    if not advice["gain_possible"]:
        lines.append(f"no gain possible: {advice['reason']}")
    for plan in advice["plans"]:
        lines += [f"{plan['plan']}  {_choice_line(choice)}" for choice in plan["choices"]]
    return lines


def _choice_line(choice: dict[str, Any]) -> str:
    return (
        f"{choice['protocol']}, domain {choice['coherence_domain']}: {choice['step_us']:.0f} "
        f"(layers {choice['wire_us']:.0f}, keys and values {choice['kv_us']:.0f}), "
        f"{choice['rows_per_token']:.1f} rows/token"
    )
