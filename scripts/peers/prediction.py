"""What the planner's time model says of an arm: milliseconds and bytes on the wire, by step and token."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from exflow.models.families import define_model
from placement.plan import PlacementPlan
from placement.timing import Links, Shape, advise, caution, rows_by_kind
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from pathlib import Path

ELEMENT_BYTES = 4


@cache
def choices(
    trace: Path, plan: Path, checkpoint: Path, links: Path, requests: int, backend: str = "exflow"
) -> list[dict[str, Any]]:
    """`exflow simulate`: protocols and domains, the fastest first."""
    loaded = PlacementPlan.load(plan)
    return advise(
        RoutingTrace.load(trace),
        loaded,
        backend=backend,
        shape=shape_of(checkpoint, requests // loaded.num_ranks),
        links=Links.load(links),
    )


def shape_of(checkpoint: Path, tokens_per_rank: int) -> Shape:
    """Sizes of a model's rows and of its keys and values, in float32."""
    definition = define_model(checkpoint)
    return Shape(
        hidden_size=definition.hidden_size,
        kv_elements=definition.kv_width,
        element_bytes=ELEMENT_BYTES,
        tokens_per_rank=tokens_per_rank,
    )


def fastest_plan(
    trace: Path, plans: list[Path], checkpoint: Path, links: Path, requests: int
) -> Path:
    """The plan whose best protocol takes the least time."""

    def best(plan: Path) -> float:
        first = choices(trace, plan, checkpoint, links, requests)[0]
        return caution(float(first["step_us"]), first["protocol"])

    return min(plans, key=best)


def predict(
    trace: Path,
    plan: Path,
    checkpoint: Path,
    links: Path,
    requests: int,
    *,
    ran: str,
    backend: str = "exflow",
) -> dict[str, float]:
    """Milliseconds a step on the wire and bytes of a token between nodes, for what an arm ran.

    Args:
        trace: routing of the profile.
        plan: where experts are.
        checkpoint: the model.
        links: their rates.
        requests: in flight.
        ran: protocol and domain.
        backend: "exflow", or one that sends a row to each rank where dispatch was flat.
    """
    protocol, domain = ran.split(", domain ")
    found = next(
        choice
        for choice in choices(trace, plan, checkpoint, links, requests, backend)
        if choice["protocol"] == protocol and choice["coherence_domain"] == int(domain)
    )
    loaded = PlacementPlan.load(plan)
    shape = shape_of(checkpoint, 1)
    rows = rows_by_kind(
        RoutingTrace.load(trace),
        loaded,
        backend=backend,
        protocol=found["protocol"],
        coherence_domain=int(domain),
    )
    shared = int(domain) > loaded.topology.ranks_per_node
    entries = shared * loaded.num_layers * (loaded.topology.num_nodes - 1)
    between = rows["inter"] * shape.hidden_size + entries * shape.kv_elements
    return {
        "wire_ms": round(found["step_us"] / 1000, 2),
        "bytes": round(between * ELEMENT_BYTES, 1),
    }
