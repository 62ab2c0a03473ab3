"""Which dispatchers bring the tokens of prompts, and those of decode steps, to their experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from exflow.runtime.coherent import CoherentDispatcher
from exflow.runtime.dispatcher import HomeDispatcher, LocalDispatcher
from exflow.runtime.hierarchical import (
    HierarchicalCoherentDispatcher,
    HierarchicalHomeDispatcher,
)
from exflow.runtime.replicated import ReplicatedDispatcher
from exflow.runtime.rows import RowFormat

if TYPE_CHECKING:
    from exflow.runtime.decoder import Decoder
    from exflow.runtime.dispatcher import Dispatcher
    from exflow.runtime.metrics import Phase
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.tables import PlacementTables
    from exflow.runtime.wire import Wire
    from placement.plan import PlacementPlan
    from placement.traffic import Dispatch

Hops: TypeAlias = Literal["flat", "hierarchical"]


def hops_for(wanted: Literal["auto"] | Hops, plan: PlacementPlan, ranks: Ranks) -> Hops:
    """Hierarchical, unless the user decides, if the job runs on several hosts.

    That costs two more messages a layer, inside nodes, and saves rows between them; so it is for
    links that differ. With one node, or one rank a node, there is nothing to fan out, and both are
    the same. With one expert a token only keys and values are fanned out, once a step.
    """
    topology = plan.topology
    if topology.num_nodes == 1 or topology.ranks_per_node == 1:
        return "flat"
    if wanted != "auto":
        return wanted
    return "hierarchical" if ranks.num_ranks > ranks.ranks_per_node else "flat"


def make_dispatchers(
    tables: PlacementTables,
    wire: Wire,
    decoder: Decoder,
    *,
    prompts: Hops,
    steps: Dispatch,
    is_coherent: bool,
) -> dict[Phase, Dispatcher]:
    """Prompts are read at home; decode steps follow the protocol.

    Args:
        tables: the plan.
        wire: the collectives.
        decoder: the model.
        prompts: how the tokens of prompts reach experts.
        steps: how those of decode steps do.
        is_coherent: whether owners move.
    """
    if tables.num_ranks == 1:
        local = LocalDispatcher(tables=tables)
        return {"prefill": local, "decode": local}
    definition = decoder.definition
    row_format = RowFormat(
        hidden_size=definition.hidden_size,
        top_k=definition.top_k,
        dtype=decoder.weights.embedding.dtype,
        has_owner=False,
    )
    is_single = definition.top_k == 1  # then nothing is fanned out

    def home(dispatch: Dispatch) -> Dispatcher:
        is_flat = is_single or dispatch == "flat"
        kind = HomeDispatcher if is_flat else HierarchicalHomeDispatcher
        return kind(tables=tables, format=row_format, wire=wire)

    if steps == "replicated":
        replicated = ReplicatedDispatcher(tables=tables, wire=wire)
        return {"prefill": home(prompts), "decode": replicated}
    if not is_coherent:
        return {"prefill": home(prompts), "decode": home(steps)}
    owned = replace(row_format, has_owner=True)
    if steps == "hierarchical" and not is_single:
        moving = HierarchicalCoherentDispatcher(tables=tables, format=owned, wire=wire)
        return {"prefill": home(prompts), "decode": moving}
    num_domains = int(tables.domain_of_rank.max()) + 1
    coherent = CoherentDispatcher(tables=tables, format=owned, wire=wire, num_domains=num_domains)
    return {"prefill": home(prompts), "decode": coherent}
