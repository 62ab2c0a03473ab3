"""`--protocol auto`: which protocol and coherence domain costs least, by the planner's time model.

A pure function of the trace, the plan, the model's shape and the links, so every rank comes to the
same choice before it has said a word to another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.timing import caution, kv_seconds, replicated_rows, rows_by_kind, step_seconds

if TYPE_CHECKING:
    from collections.abc import Collection

    from placement.plan import PlacementPlan
    from placement.timing import Links, Shape
    from placement.trace import RoutingTrace
    from placement.traffic import Dispatch, Protocol

MAX_TOKENS = 20_000
REPLICATED_BYTES = 1 << 15  # of a batch's hidden states, up to which to think of replicating them
BACKEND_OF: dict[Dispatch, str] = {"flat": "nvlink-one-sided", "hierarchical": "exflow"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to decode and its expected time on the wire.

    Attributes:
        protocol: "home" or "coherent".
        coherence_domain: ranks that share keys and values.
        dispatch: how tokens reach experts.
        rows_per_token: rows on the wire, all layers.
        layers_us: microseconds a step for rows and latencies of all layers.
        kv_us: microseconds a step that keys and values take on the same links, beside the rows.
    """

    protocol: Protocol
    coherence_domain: int
    dispatch: Dispatch
    rows_per_token: float
    layers_us: float
    kv_us: float

    @property
    def step_us(self) -> float:
        """Microseconds a step."""
        return self.layers_us + self.kv_us

    def __str__(self) -> str:
        return (
            f"{self.protocol}, domain {self.coherence_domain}, {self.dispatch}: "
            f"{self.step_us:.0f} us a step "
            f"(layers {self.layers_us:.0f}, keys and values {self.kv_us:.0f}; "
            f"{self.rows_per_token:.1f} rows a token)"
        )


def rank_protocols(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    shape: Shape,
    links: Links,
    dispatches: Collection[Dispatch],
    sharing: Dispatch = "flat",
) -> list[Choice]:
    """`home`, and `coherent` within nodes and over all ranks; the cheapest by `caution` first.

    Where dispatch is replicated, it is `coherent` over all ranks.

    Args:
        trace: how the model routes; its first tokens are counted.
        plan: where experts are.
        shape: bytes of a row, of keys and values, and tokens a step.
        links: latencies and bandwidths.
        dispatches: of "flat", "hierarchical", which adds two messages inside nodes to each layer,
            but none where a token has one expert, and "replicated".
        sharing: "hierarchical" where keys and values cross to a node once even if rows go flat.
    """
    if trace.num_tokens > MAX_TOKENS:
        trace = _first(trace, MAX_TOKENS)
    domains = sorted({1, plan.topology.ranks_per_node, plan.num_ranks})
    choices = [
        _choice(trace, plan, domain, shape=shape, links=links, dispatch=dispatch, sharing=sharing)
        for dispatch in sorted(dispatches)
        for domain in (domains if dispatch != "replicated" else [plan.num_ranks])
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
    sharing: Dispatch,
) -> Choice:
    protocol: Protocol = "home" if domain == 1 else "coherent"
    is_replicated = dispatch == "replicated"
    if is_replicated:
        rows = replicated_rows(plan)
    else:
        rows = rows_by_kind(
            trace, plan, backend=BACKEND_OF[dispatch], protocol=protocol, coherence_domain=domain
        )
    is_single = is_replicated or (trace.top_k == 1 and domain == plan.num_ranks)
    seconds = step_seconds(rows, plan, shape=shape, links=links, phases=1 if is_single else 2)
    kv = 0.0
    if not is_replicated:
        hops: Dispatch = "hierarchical" if "hierarchical" in (dispatch, sharing) else "flat"
        kv = kv_seconds(plan, domain, shape=shape, links=links, dispatch=hops)
    if dispatch == "hierarchical" and trace.top_k > 1:
        seconds += 2 * plan.num_layers * links.intra_latency
    return Choice(
        protocol=protocol,
        coherence_domain=domain,
        dispatch=dispatch,
        rows_per_token=rows["intra"] + rows["inter"],
        layers_us=seconds * 1e6,
        kv_us=kv * 1e6,
    )


def _first(trace: RoutingTrace, num_tokens: int) -> RoutingTrace:
    """The first tokens of a trace, with all that is recorded for each."""
    part = {
        field.name: value[:num_tokens]
        for field in dataclasses.fields(trace)
        if hasattr(value := getattr(trace, field.name), "shape")
    }
    return dataclasses.replace(trace, **part)
