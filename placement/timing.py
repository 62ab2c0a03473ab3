"""How long the rows of a plan take on the wire: an alpha-beta model of links, and backends.

One phase (dispatch or combine) of one layer takes alpha + bytes / beta on the slower of the two
kinds of link, where bytes are those of the rank that sends or receives most. Backends differ in what
they send for one token:

    backend           rows of a token                      defaults from
    exflow            one a rank; inter-node one a node    this project
    deepep-v2         one a rank; inter-node one a node    DeepEP V2 README
    nvlink-one-sided  one a rank                           TensorRT-LLM, FlashInfer
    nccl-ep           one a rank                           NCCL EP, rank-major
    deepep-ll, pplx   one an expert                        DeepEP V1 low latency, pplx-kernels
    deepspeed         one an expert                        DeepSpeed AutoEP
    agrs              all tokens to all ranks              vLLM's default: allgather, reduce-scatter

Default links: NVLink 450 GB/s and 41.6 us a phase (pplx, 8 ranks, one token), InfiniBand 50 GB/s a
GPU and 82.7 us (pplx, IBGDA, 16 ranks: 102.7 dispatch, 62.7 combine).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from placement.errors import UserError
from placement.json_text import parse_json
from placement.rules import first_owner, walk_layers
from placement.traffic import check_rows, count_traffic

if TYPE_CHECKING:
    from pathlib import Path

    from placement.plan import PlacementPlan
    from placement.trace import RoutingTrace
    from placement.traffic import Dispatch, Protocol, Traffic

FORECAST_MARGIN = 0.05
Unit = Literal["rank", "node", "expert", "all"]
BACKENDS: dict[str, Unit] = {
    "exflow": "node",
    "deepep-v2": "node",
    "nvlink-one-sided": "rank",
    "nccl-ep": "rank",
    "deepep-ll": "expert",
    "pplx": "expert",
    "deepspeed": "expert",
    "agrs": "all",
}
WITHOUT_COPIES = ("deepspeed",)
CHUNK_CELLS = 1 << 22


class TimingError(UserError):
    """An unknown backend, or links that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Latency of a phase in seconds and bandwidth of a rank in bytes per second, by kind of link."""

    intra_latency: float = 41.6e-6
    intra_bandwidth: float = 450e9
    inter_latency: float = 82.7e-6
    inter_bandwidth: float = 50e9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_enough = value > 0 or (value == 0 and "latency" in name)
            if not (is_enough and math.isfinite(value)):
                msg = f"{name} must be above 0 and finite, got {value}"
                raise TimingError(msg)

    @property
    def intra_node_cost(self) -> float:
        """What a row inside a node costs where a row between nodes costs 1."""
        return min(1.0, self.inter_bandwidth / self.intra_bandwidth)

    @classmethod
    def load(cls, path: Path) -> Links:
        """Reads JSON with any of the four fields, in seconds and bytes per second.

        Raises:
            TimingError: if the file is no such JSON.
        """
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
            return cls(**{name: float(value) for name, value in data.items()})
        except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
            known = ", ".join(cls.__dataclass_fields__)
            msg = f"{path}: links are JSON with numbers for any of {known}: {error}"
            raise TimingError(msg) from error


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a row weighs.

    Attributes:
        hidden_size: elements of a row.
        kv_elements: K and V elements of a token at a layer.
        element_bytes: bytes of an element.
        tokens_per_rank: tokens of a rank in a step.
    """

    hidden_size: int
    kv_elements: int
    element_bytes: int = 2
    tokens_per_rank: int = 32


def rows_by_kind(
    trace: RoutingTrace,
    plan: PlacementPlan,
    *,
    backend: str,
    protocol: Protocol,
    coherence_domain: int | None = None,
    traffic: Traffic | None = None,
) -> dict[str, float]:
    """Rows per token inside nodes and between nodes, both ways, all layers, as a backend sends.

    Args:
        trace: recorded routing.
        plan: where experts are.
        backend: one of `BACKENDS`.
        protocol: "home" or "coherent".
        coherence_domain: ranks in a coherence domain; None means all.
        traffic: of these, if it has been counted.

    Raises:
        TimingError: if the backend is unknown.
        UserError: as `count_traffic`.
    """
    unit = unit_of(backend)
    check_rows(trace, plan)
    topology, ranks = plan.topology, plan.num_ranks
    if unit == "all":
        phases = 2 * plan.num_layers
        inner = topology.ranks_per_node - 1
        return {"intra": float(phases * inner), "inter": float(phases * (ranks - 1 - inner))}
    if unit == "expert":
        return _rows_by_expert(trace, plan, 1 if protocol == "home" else coherence_domain)
    traffic = traffic or count_traffic(
        trace, plan, protocol=protocol, coherence_domain=coherence_domain
    )
    rows = traffic.rows_per_token()
    inter = rows["inter_node_dedup" if unit == "node" else "inter_node"]
    return {"intra": rows["total"] - inter, "inter": inter}


def replicated_rows(plan: PlacementPlan) -> dict[str, float]:
    """`rows_by_kind` where dispatch is replicated: each rank's partial sum to every other."""
    inside, outside = plan.topology.ranks_per_node - 1, plan.num_ranks
    outside -= plan.topology.ranks_per_node
    sources = plan.num_layers * plan.num_ranks
    return {"intra": float(sources * inside), "inter": float(sources * outside)}


def unit_of(backend: str) -> Unit:
    """What a backend sends one row for.

    Raises:
        TimingError: if the backend is unknown.
    """
    if backend not in BACKENDS:
        msg = f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}"
        raise TimingError(msg)
    return BACKENDS[backend]


def _rows_by_expert(
    trace: RoutingTrace, plan: PlacementPlan, domain: int | None
) -> dict[str, float]:
    node, hosts = plan.topology.node_of_rank, plan.hosts().astype(np.int64)
    domain_of_rank = plan.topology.domain_of_rank(domain)
    chunk = max(1, CHUNK_CELLS // (plan.num_ranks * (trace.top_k + 4)))
    total = inter = 0
    for start in range(0, trace.num_tokens, chunk):
        part = slice(start, start + chunk)
        home = (trace.sequence_ids[part] % plan.num_ranks).astype(np.int64)
        foretold = None if trace.foretold_ids is None else trace.foretold_ids[part].astype(np.int64)
        steps = walk_layers(
            trace.expert_ids[part].astype(np.int64),
            first_owner(hosts[0], foretold, home, node, domain_of_rank),
            hosts,
            node_of_rank=node,
            domain_of_rank=domain_of_rank,
        )
        for step in steps:
            for end in (step.owner, step.next_owner):
                total += int((step.rank_of_choice != end[:, None]).sum())
                inter += int((node[step.rank_of_choice] != node[end][:, None]).sum())
    return {"intra": (total - inter) / trace.num_tokens, "inter": inter / trace.num_tokens}


def step_seconds(
    rows: dict[str, float],
    plan: PlacementPlan,
    *,
    shape: Shape,
    links: Links,
    imbalance: float = 1.0,
    phases: int = 2,
) -> float:
    """Seconds that one decode step spends on the wire.

    Args:
        rows: from `rows_by_kind`.
        plan: tells layers and nodes.
        shape: what a row weighs, and tokens a rank.
        links: latencies and bandwidths.
        imbalance: max / mean over ranks of what is sent.
        phases: 2, or 1 where nothing is combined (top-1 `coherent`).
    """
    row_bytes = shape.hidden_size * shape.element_bytes * shape.tokens_per_rank * imbalance
    intra = rows["intra"] * row_bytes / links.intra_bandwidth
    inter = rows["inter"] * row_bytes / links.inter_bandwidth
    latency = links.intra_latency if plan.topology.num_nodes == 1 else links.inter_latency
    return plan.num_layers * phases * latency + max(intra, inter)


def kv_seconds(
    plan: PlacementPlan, domain: int, *, shape: Shape, links: Links, dispatch: Dispatch = "flat"
) -> float:
    """Seconds to share a step's new keys and values with the domain.

    Args:
        plan: tells layers and nodes.
        domain: ranks that share them.
        shape: bytes of keys and values, and tokens a rank.
        links: bandwidths.
        dispatch: "flat": a rank sends its own to every other; "hierarchical": to one rank of each
            other node, which passes them on inside.
    """
    sent = shape.kv_elements * shape.element_bytes * shape.tokens_per_rank * plan.num_layers
    of_node = min(domain, plan.topology.ranks_per_node)
    inside, outside = of_node - 1, domain - of_node
    if dispatch == "hierarchical":
        outside //= of_node
        inside += outside * (of_node - 1)
    return sent * max(inside / links.intra_bandwidth, outside / links.inter_bandwidth)


def caution(step: float, protocol: Protocol) -> float:
    """The time of a step to compare protocols by.

    What `coherent` saves rests on affinity seen in other text, and is a little less elsewhere: on a
    cluster in a box its bytes were 1 to 3% above those foretold from texts as long, and up to 9%
    from longer ones; those of `home` were as foretold.
    """
    return step * (1 + FORECAST_MARGIN) if protocol == "coherent" else step


def advise(
    trace: RoutingTrace, plan: PlacementPlan, *, backend: str, shape: Shape, links: Links
) -> list[dict[str, Any]]:
    """Every protocol and coherence domain with its rows and times, the fastest by `caution` first.

    A step's time is that of the layers' phases and of sharing keys and values, which
    cross to a node once. Backends other than exflow return tokens home, so only `home` is listed.
    """
    ranks, choices = plan.num_ranks, []
    for domain in (d for d in range(1, ranks + 1) if ranks % d == 0):
        if domain > 1 and backend != "exflow":
            break
        protocol: Protocol = "home" if domain == 1 else "coherent"
        rows = rows_by_kind(
            trace, plan, backend=backend, protocol=protocol, coherence_domain=domain
        )
        single = trace.top_k == 1 and domain == ranks
        wire = step_seconds(rows, plan, shape=shape, links=links, phases=1 if single else 2)
        kv = kv_seconds(plan, domain, shape=shape, links=links, dispatch="hierarchical")
        choices.append(
            {
                "protocol": protocol,
                "coherence_domain": domain,
                "rows_per_token": rows["intra"] + rows["inter"],
                "inter_node_rows": rows["inter"],
                "wire_us": wire * 1e6,
                "kv_us": kv * 1e6,
                "step_us": (wire + kv) * 1e6,
            }
        )
    return sorted(choices, key=lambda choice: caution(choice["step_us"], choice["protocol"]))


def protocol_for(backend: str, asked: Protocol | None) -> Protocol:
    """The protocol that a backend follows: as asked, or `coherent` for exflow and `home` for others.

    Raises:
        TimingError: if the backend is unknown, or brings tokens home and `coherent` is asked.
    """
    unit_of(backend)
    if backend == "exflow":
        return asked or "coherent"
    if asked == "coherent":
        msg = (
            f"{backend} brings tokens home after every layer: leave out --protocol, or say home; "
            f"only exflow has --protocol coherent"
        )
        raise TimingError(msg)
    return "home"


def why_no_gain(backend: str, *, has_copies: bool) -> str | None:
    """Why a backend sends the same rows wherever experts are; None if it does not.

    Args:
        backend: one of `BACKENDS`.
        has_copies: whether experts may have several.
    """
    unit = unit_of(backend)
    if unit == "all":
        return f"{backend} sends all tokens to all ranks whatever the placement"
    if unit == "expert" and (not has_copies or backend in WITHOUT_COPIES):
        return (
            f"{backend} sends a row for each expert of a token, as many wherever single copies are"
        )
    return None
