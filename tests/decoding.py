"""Decode on the ranks of a test, with all there is to check: tokens, logits, rows, routing."""

from dataclasses import dataclass, replace

import numpy as np
import torch

import exflow.runtime.steps
from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.runtime.decoder import Decoder
from exflow.runtime.engine import Engine, EngineOptions
from exflow.runtime.metrics import join_phases
from exflow.runtime.ranks import Ranks
from exflow.runtime.recorder import DecodeRecorder
from exflow.runtime.requests import Request, SamplingParams
from exflow.runtime.weights import load_weights
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from placement.traffic import count_traffic
from tiny_checkpoints import decode_with_transformers, make_prompts

CPU = torch.device("cpu")
PROMPTS = make_prompts([5, 17, 1, 30, 8, 3, 9])
NEW_TOKENS = 5


@dataclass(frozen=True)
class Model:
    """What ranks need to decode, and what transformers makes of it."""

    folder: str
    definition: object
    tokens: list
    logits: list


@dataclass(frozen=True)
class Case:
    """One way to decode."""

    plan: PlacementPlan
    options: EngineOptions
    params: SamplingParams
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """What came of it, on one rank."""

    tokens: list
    logits: dict
    decode: dict
    trace: object


def save_model(save, folder, **changes):
    """A tiny checkpoint, and what transformers makes of the prompts."""
    path = save(folder / "tiny", **changes)
    reference = decode_with_transformers(path, PROMPTS, NEW_TOKENS)
    logits = [part.numpy() for part in reference.logits]
    return Model(str(path), define_model(path), reference.tokens, logits)


def make_plan(definition, num_ranks, kind, seed=0):
    """Experts in order; at random; or with copies and ranks that hold nothing.

    All but the first have an outlook, which moves owners.
    """
    rng = np.random.default_rng(seed)
    layers, experts = len(definition.moe_layer_ids), definition.num_experts
    hosts = np.zeros((layers, experts, num_ranks), dtype=bool)
    if kind == "linear":
        hosts[:, np.arange(experts), np.arange(experts) * num_ranks // experts] = True
    elif kind == "random":
        for layer in hosts:
            layer[np.arange(experts), rng.integers(num_ranks, size=experts)] = True
    elif kind == "copies":
        hosts[:, :, -1] = rng.random((layers, experts)) < 0.5
        hosts[:, :, 0] = ~hosts[:, :, -1] | (rng.random((layers, experts)) < 0.4)
    num_nodes = 2 if num_ranks % 2 == 0 else 1
    plan = PlacementPlan.from_hosts(
        hosts,
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=num_nodes, ranks_per_node=num_ranks // num_nodes),
        strategy=Strategy(name=kind, seed=seed),
    )
    if kind == "linear":
        return plan
    outlook = rng.integers(9, size=hosts.shape).tolist()
    return replace(plan, outlook=tuple(tuple(map(tuple, layer)) for layer in outlook))


def make_case(plan, protocol="home", domain=None, batch_size=5, **params):
    return Case(
        plan,
        EngineOptions(protocol=protocol, coherence_domain=domain, batch_size=batch_size),
        SamplingParams(**({"max_tokens": NEW_TOKENS} | params)),
    )


def sharing_at_once(case):
    """The same, keys and values leaving after each layer instead of with the new tokens."""
    return replace(case, options=replace(case.options, share_bytes=1))


def sharing_at_the_end(case):
    """The same, keys and values leaving at the step's end, in a message of their own."""
    return replace(case, options=replace(case.options, share_bytes=1 << 12))


def decode(model, case, prompts=PROMPTS):
    """Decode on this rank and the others."""
    ranks, definition = Ranks.from_environment(), model.definition
    device = torch.device(case.device)
    weights = load_weights(
        Checkpoint(model.folder),
        definition,
        [layer[ranks.rank] for layer in case.plan.slots],
        dtype=torch.float32,
        device=device,
    )
    recorder = DecodeRecorder(definition)
    engine = Engine(
        Decoder(definition, weights), case.plan, ranks, options=case.options, recorder=recorder
    )
    requests = [
        Request(index=i, id=i, prompt="", token_ids=tuple(p)) for i, p in enumerate(prompts)
    ]
    logits: dict = {}
    with keeping_logits(logits):
        tokens = {
            c.request.index: list(c.token_ids) for c in engine.generate(requests, case.params)
        }
    by_rank = ranks.gather(engine.metrics["decode"].to_json(), device)
    return Result(
        tokens=[tokens[index] for index in range(len(prompts))],
        logits=logits,
        decode=join_phases(by_rank),
        trace=recorder.gather(ranks, device, source="test", foretell=engine.foretell),
    )


class keeping_logits:  # noqa: N801
    """Logits by (request, position), of what this rank samples."""

    def __init__(self, logits, dtype=None):
        self.logits, self.dtype = logits, dtype
        self.sample = exflow.runtime.steps.sample

    def __enter__(self):
        exflow.runtime.steps.sample = self.sample_and_keep

    def __exit__(self, *_):
        exflow.runtime.steps.sample = self.sample

    def sample_and_keep(self, logits, params, *, request_indices, positions):
        keys = zip(request_indices.tolist(), positions.tolist(), strict=True)
        kept = logits.to("cpu", self.dtype, copy=True).numpy()
        self.logits.update({key: kept[row] for row, key in enumerate(keys)})
        return self.sample(logits, params, request_indices=request_indices, positions=positions)


def decode_all(model, cases):
    return [decode(model, case) for case in cases]


def check_traffic(result, case):
    traffic = count_traffic(
        result.trace,
        case.plan,
        protocol=case.options.protocol,
        coherence_domain=case.options.coherence_domain,
        dispatch="flat" if case.options.dispatch == "auto" else case.options.dispatch,
    )
    assert np.array_equal(result.decode["rows"]["dispatch"], traffic.dispatch)
    assert np.array_equal(result.decode["rows"]["combine"], traffic.combine)
    return traffic


def protocols(num_ranks):
    domains = sorted({1, min(2, num_ranks), num_ranks})
    return [("home", None), *[("coherent", domain) for domain in domains]]


def check_logits(found, model, error=1e-5):
    for index, expected in enumerate(model.logits):
        scale = max(1.0, float(np.abs(expected).max()))
        for step, row in enumerate(expected):
            difference = np.abs(found[index, len(PROMPTS[index]) + step] - row).max()
            assert difference <= error * scale
