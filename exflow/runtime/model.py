"""A model, a plan and options in; an engine on this rank out. What a job and an `LLM` share.

What every rank can check by itself is checked in `prepare_model`, before the ranks connect.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exflow.assets import resolve_model
from exflow.models.checkpoint import checkpoint_folder
from exflow.models.families import define_model
from exflow.profiling.checkpoint import choose_device, load_tokenizer
from exflow.runtime.decoder import Decoder
from exflow.runtime.engine import Engine, EngineOptions
from exflow.runtime.protocol_choice import REPLICATED_BYTES, rank_protocols
from exflow.runtime.ranks import DEFAULT_TIMEOUT
from exflow.runtime.weights import load_weights
from placement.errors import UserError
from placement.plan import PlacementPlan, Strategy
from placement.timing import Links, Shape
from placement.topology import Topology
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from exflow.models.checkpoint import Checkpoint
    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.recorder import DecodeRecorder
    from placement.traffic import Dispatch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LONGEST_TIMEOUT = 10**7


logger = logging.getLogger(__name__)


class ModelError(UserError):
    """Options that make no sense."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is spread and run.

    Attributes:
        model: a bundled model's name, a folder or a hub id.
        plan: a placement plan or its file; None places experts in order.
        engine: protocol, domain, batch size and memory.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        device: "auto", "cpu", "cuda" or "cuda:N".
        timeout: seconds after which a rank that does not answer is given up.
        routing: a trace by which the protocol and its domain are chosen, instead of the engine's.
        links: JSON with latencies and bandwidths for that choice.
    """

    model: str
    plan: PlacementPlan | Path | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    dtype: str = "auto"
    device: str = "auto"
    timeout: float = DEFAULT_TIMEOUT
    routing: Path | None = None
    links: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            msg = f"--dtype must be one of auto, {', '.join(DTYPES)}; got {self.dtype!r}"
            raise ModelError(msg)
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            msg = f"--timeout must be above 0 and at most {LONGEST_TIMEOUT} s, got {self.timeout}"
            raise ModelError(msg)
        if self.links is not None and self.routing is None:
            msg = "--links are for --protocol auto, which chooses by them; leave them out"
            raise ModelError(msg)
        if self.engine.coherence_domain is not None and self.routing is not None:
            msg = "--protocol auto chooses the coherence domain; leave --coherence-domain out"
            raise ModelError(msg)


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """What every rank has found out by itself.

    Attributes:
        folder: the checkpoint.
        definition: the model.
        plan: a plan that fits it and the ranks.
        engine: how to decode.
        tokenizer: the model's.
        device: where this rank computes.
        dtype: the number format.
    """

    folder: Path
    definition: DecoderDefinition
    plan: PlacementPlan
    engine: EngineOptions
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    def given(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What must be the same on all ranks, for `check_same`; folders may have other names."""
        plan = self.plan
        return {
            "model": (replace(self.definition, name=""), checkpoint.fingerprint()),
            "plan": (plan.layer_ids, plan.topology, plan.slots, plan.outlook),
            "dtype": self.dtype,
            **{option.name: getattr(self.engine, option.name) for option in fields(self.engine)},
        }


def routing_for(protocol: str, routing: Path | None) -> Path | None:
    """The trace by which to choose a protocol; None where the user chose one.

    Raises:
        ModelError: "auto" without a trace, or a trace without "auto".
    """
    if protocol != "auto":
        if routing is not None:
            msg = f"--routing is for --protocol auto, and the protocol is {protocol}; leave it out"
            raise ModelError(msg)
        return None
    if routing is None:
        msg = (
            "protocol auto needs a routing trace of the model, the one the plan was made from for "
            "example: give --routing TRACE"
        )
        raise ModelError(msg)
    return routing


def prepare_model(options: ModelOptions, ranks: Ranks) -> PreparedModel:
    """Check all that needs no other rank.

    Raises:
        UserError: the model or the plan cannot be used, or they do not fit together.
    """
    device = torch.device(choose_device(options.device, ranks.local_rank))
    resolved = resolve_model(options.model)
    folder = checkpoint_folder(resolved)
    is_local = Path(resolved).is_dir()
    definition = define_model(folder, name=folder.resolve().name if is_local else options.model)
    plan = _plan(options, definition, ranks)
    default = "float32" if device.type == "cpu" else "bfloat16"
    dtype = DTYPES[default if options.dtype == "auto" else options.dtype]
    engine = _engine_options(options, plan, definition, ranks, dtype)
    plan.topology.domain_of_rank(engine.domain_size)
    engine.kv_budget.pages(definition, dtype)
    return PreparedModel(
        folder=folder,
        definition=definition,
        plan=plan,
        engine=engine,
        tokenizer=load_tokenizer(str(folder)),
        device=device,
        dtype=dtype,
    )


def load_engine(
    prepared: PreparedModel,
    checkpoint: Checkpoint,
    ranks: Ranks,
    *,
    recorder: DecodeRecorder | None = None,
) -> Engine:
    """Read this rank's weights and make its engine.

    Args:
        prepared: the model and the plan.
        checkpoint: where to read the weights.
        ranks: this rank.
        recorder: takes down the routing of decode steps.
    """
    weights = load_weights(
        checkpoint,
        prepared.definition,
        [layer[ranks.rank] for layer in prepared.plan.slots],
        dtype=prepared.dtype,
        device=prepared.device,
    )
    return Engine(
        Decoder(prepared.definition, weights),
        prepared.plan,
        ranks,
        options=prepared.engine,
        recorder=recorder,
        tokenizer=prepared.tokenizer,
    )


def _engine_options(
    options: ModelOptions,
    plan: PlacementPlan,
    definition: DecoderDefinition,
    ranks: Ranks,
    dtype: torch.dtype,
) -> EngineOptions:
    """The user's options with nothing left to choose."""
    engine = options.engine
    prompts = engine.prefill_dispatch_for(plan, ranks)
    if options.routing is None:
        steps = engine.dispatch_for(plan, ranks)
        return replace(engine, dispatch=steps, prefill_dispatch=prompts)
    dispatches: set[Dispatch] = {"replicated" if engine.dispatch == "replicated" else prompts}
    if engine.dispatch == "auto":
        if definition.top_k > 1:
            dispatches.add("flat")
        if engine.batch_size * definition.hidden_size * dtype.itemsize <= REPLICATED_BYTES:
            dispatches.add("replicated")
    trace = RoutingTrace.load(options.routing)
    choices = rank_protocols(
        trace,
        plan,
        shape=Shape(
            hidden_size=definition.hidden_size,
            kv_elements=definition.kv_width,
            element_bytes=dtype.itemsize,
            tokens_per_rank=-(-engine.batch_size // ranks.num_ranks),
        ),
        links=Links() if options.links is None else Links.load(options.links),
        dispatches=dispatches,
        sharing=prompts,
    )
    best = choices[0]
    if ranks.is_first:
        others = "; ".join(str(choice) for choice in choices[1:])
        logger.info("protocol auto: %s. Rejected: %s", best, others or "nothing")
    return replace(
        engine,
        protocol=best.protocol,
        coherence_domain=best.coherence_domain,
        dispatch=best.dispatch,
        prefill_dispatch=prompts,
    )


def _plan(options: ModelOptions, definition: DecoderDefinition, ranks: Ranks) -> PlacementPlan:
    """The plan asked for, which fits the model and the ranks, or one with experts in order."""
    if options.plan is None:
        return _linear_plan(definition, ranks)
    plan = options.plan
    if not isinstance(plan, PlacementPlan):
        plan = PlacementPlan.load(plan)
    plan.check_for(
        model=definition.name,
        num_experts=definition.num_experts,
        layer_ids=definition.moe_layer_ids,
        num_ranks=ranks.num_ranks,
    )
    return plan


def _linear_plan(definition: DecoderDefinition, ranks: Ranks) -> PlacementPlan:
    """Experts in order, the same number on each rank as far as they go."""
    rank_of_expert = np.arange(definition.num_experts) * ranks.num_ranks // definition.num_experts
    layers = definition.moe_layer_ids
    return PlacementPlan.from_rank_of_expert(
        np.tile(rank_of_expert, (len(layers), 1)),
        model=definition.name,
        layer_ids=layers,
        topology=Topology(
            num_nodes=ranks.num_ranks // ranks.ranks_per_node, ranks_per_node=ranks.ranks_per_node
        ),
        strategy=Strategy(name="linear"),
    )
