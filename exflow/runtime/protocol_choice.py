"""`--protocol auto`: which protocol and coherence domain costs least, by the planner's time model.

A pure function of the trace, the plan, the model's shape and the links, so every rank comes to the
same choice before it has said a word to another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.timing import caution, kv_seconds, rows_by_kind, step_seconds

if TYPE_CHECKING:
    from placement.plan import PlacementPlan
    from placement.timing import Links, Shape
    from placement.trace import RoutingTrace
    from placement.traffic import Dispatch, Protocol

MAX_TOKENS = 20_000
BACKEND_OF: dict[Dispatch, str] = {"flat": "nvlink-one-sided", "hierarchical": "exflow"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to decode and its expected time on the wire.

    Attributes:
        protocol: "home" or "coherent".
        coherence_domain: ranks that share keys and values.
        rows_per_token: rows on the wire, all layers.
        layers_us: microseconds a step for rows and latencies of all layers.
        kv_us: microseconds a step that keys and values take on the same links, beside the rows.
    """

    protocol: Protocol
    coherence_domain: int
    rows_per_token: float
    layers_us: float
    kv_us: float

    @property
    def step_us(self) -> float:
        """Microseconds a step."""
        return self.layers_us + self.kv_us

    def __str__(self) -> str:
        return (
            f"{self.protocol}, domain {self.coherence_domain}: {self.step_us:.0f} us a step "
            f"(layers {self.layers_us:.0f}, keys and values {self.kv_us:.0f}; "
            f"{self.rows_per_token:.1f} rows a token)"
        )


def rank_protocols(
    trace: RoutingTrace, plan: PlacementPlan, *, shape: Shape, links: Links, dispatch: Dispatch
) -> list[Choice]:
    """`home`, and `coherent` within nodes and over all ranks; the cheapest by `caution` first.

    Args:
        trace: how the model routes; its first tokens are counted.
        plan: where experts are.
        shape: bytes of a row, of keys and values, and tokens a step.
        links: latencies and bandwidths.
        dispatch: "flat" or "hierarchical", which adds two messages inside nodes to each layer, but
            none where a token has one expert.
    """
    if trace.num_tokens > MAX_TOKENS:
        trace = _first(trace, MAX_TOKENS)
    domains = sorted({1, plan.topology.ranks_per_node, plan.num_ranks})
    choices = [
        _choice(trace, plan, domain, shape=shape, links=links, dispatch=dispatch)
        for domain in domains
    ]
    return sorted(choices, key=lambda choice: caution(choice.step_us, choice.protocol))


def _choice(
    trace: RoutingTrace,
    plan: PlacementPlan,
    domain: int,
    *,
    shape: Shape,
    links: Links,
    dispatch: Dispatch,
) -> Choice:
    protocol: Protocol = "home" if domain == 1 else "coherent"
    rows = rows_by_kind(
        trace, plan, backend=BACKEND_OF[dispatch], protocol=protocol, coherence_domain=domain
    )
    is_single = trace.top_k == 1 and domain == plan.num_ranks
    seconds = step_seconds(rows, plan, shape=shape, links=links, phases=1 if is_single else 2)
    if dispatch == "hierarchical" and trace.top_k > 1:
        seconds += 2 * plan.num_layers * links.intra_latency
    return Choice(
        protocol=protocol,
        coherence_domain=domain,
        rows_per_token=rows["intra"] + rows["inter"],
        layers_us=seconds * 1e6,
        kv_us=1e6 * kv_seconds(plan, domain, shape=shape, links=links, dispatch=dispatch),
    )


def _first(trace: RoutingTrace, num_tokens: int) -> RoutingTrace:
    """The first tokens of a trace, with all that is recorded for each."""
    part = {
        field.name: value[:num_tokens]
        for field in dataclasses.fields(trace)
        if hasattr(value := getattr(trace, field.name), "shape")
    }
    return dataclasses.replace(trace, **part)
