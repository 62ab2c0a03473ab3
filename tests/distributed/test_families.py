"""Every family on real gloo ranks gives the tokens and logits of its reference.

The reference is `transformers`, and for the GPT with top-1 experts, which `transformers` does not
have, its GPT-2 with plain experts in place of every second layer's block (`gpt_moe.py`). Ranks are
started once for each number of them and decode all families in all the ways below.
"""

from dataclasses import dataclass

import numpy as np
import pytest
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
from harness import run_ranks
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from placement.traffic import count_traffic
from tiny_checkpoints import FAMILIES, decode_with_transformers, make_prompts

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
PROMPTS = make_prompts([5, 17, 1, 9, 3])
NEW_TOKENS = 5
# Logits of these random models are of size 10; greedy tokens are far from ties.
SMALLEST_MARGIN = 1e-3
LARGEST_ERROR = 1e-5


@dataclass(frozen=True)
class Model:
    """What ranks need to decode, and what the reference makes of it."""

    folder: str
    definition: object
    tokens: list
    logits: list


@dataclass(frozen=True)
class Way:
    """A kind of plan, a protocol, prompt tokens read at a time, and how rows cross nodes."""

    plan: str
    protocol: str = "home"
    domain: int | None = None
    prefill_chunk: int | None = None
    dispatch: str = "flat"


WAYS = {
    1: [Way("linear"), Way("linear", prefill_chunk=4)],
    2: [
        Way("random"),
        Way("random", "coherent", 2, prefill_chunk=4),
        Way("replicas"),
        Way("uneven", "coherent", 2),
        Way("random", "coherent", 2, dispatch="replicated"),
    ],
    4: [
        Way("random"),
        Way("random", "coherent", 2),
        Way("random", "coherent", 4),
        Way("replicas", "coherent", 2),
        Way("replicas", "coherent", 4, dispatch="hierarchical"),
        Way("uneven", "coherent", 4),
        Way("replicas", "coherent", 4, dispatch="replicated"),
    ],
}


@dataclass(frozen=True)
class Result:
    """What one rank decoded.

    Attributes:
        tokens: by request.
        errors: by (request, step) of what it sampled, relative to the largest logit.
        rows: (dispatch, combine) measured, and as the planner counts them.
    """

    tokens: list
    errors: dict
    rows: tuple


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: make_model(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def make_model(name, folder):
    save, changes = FAMILIES[name]
    path = save(folder / "tiny", **changes)
    reference = decode_with_transformers(path, PROMPTS, NEW_TOKENS)
    logits = [part.numpy() for part in reference.logits]
    return Model(str(path), define_model(path), reference.tokens, logits)


@dataclass(frozen=True)
class Decoded:
    """What some ranks decoded: the ways, and each rank's results by family."""

    ways: list
    by_rank: list


@pytest.fixture(scope="module", params=WAYS)
def decoded(request, models):
    ways = WAYS[request.param]
    by_rank = run_ranks(request.param, decode_families, models, ways, timeout=150)
    return Decoded(ways, by_rank)


def decode_families(models, ways):
    return {name: [decode(model, way) for way in ways] for name, model in models.items()}


def decode(model, way):
    """Decode on this rank and the others."""
    ranks, definition = Ranks.from_environment(), model.definition
    plan = make_plan(definition, ranks.num_ranks, way.plan)
    slots = [layer[ranks.rank] for layer in plan.slots]
    weights = load_weights(
        Checkpoint(model.folder), definition, slots, dtype=torch.float32, device=CPU
    )
    options = EngineOptions(
        protocol=way.protocol,
        coherence_domain=way.domain,
        batch_size=4,
        prefill_chunk=way.prefill_chunk,
        dispatch=way.dispatch,
    )
    recorder = DecodeRecorder(definition)
    engine = Engine(Decoder(definition, weights), plan, ranks, options=options, recorder=recorder)
    requests = [
        Request(index=i, id=i, prompt="", token_ids=tuple(prompt))
        for i, prompt in enumerate(PROMPTS)
    ]
    with measuring_errors(model) as errors:
        completions = engine.generate(requests, SamplingParams(max_tokens=NEW_TOKENS))
        tokens = {done.request.index: list(done.token_ids) for done in completions}
    measured = join_phases(ranks.gather(engine.metrics["decode"].to_json(), CPU))["rows"]
    traffic = count_traffic(
        recorder.gather(ranks, CPU, source="test", foretell=engine.foretell),
        plan,
        protocol=way.protocol,
        coherence_domain=way.domain,
        dispatch=way.dispatch,
    )
    return Result(
        tokens=[tokens[index] for index in range(len(PROMPTS))],
        errors=errors,
        rows=(
            (np.asarray(measured["dispatch"]), traffic.dispatch),
            (np.asarray(measured["combine"]), traffic.combine),
        ),
    )


def make_plan(definition, num_ranks, kind):
    """In order; as many experts on each rank, at random; with copies; or 1, 2, 3, ... experts."""
    rng = np.random.default_rng(len(kind))
    layers, experts = len(definition.moe_layer_ids), definition.num_experts
    hosts = np.zeros((layers, experts, num_ranks), dtype=bool)
    even = np.arange(experts) * num_ranks // experts
    for layer in hosts:
        ranks = even if kind == "linear" else rng.permutation(even)
        if kind == "uneven":  # rank 0 has nothing
            shares = np.arange(num_ranks) / np.arange(num_ranks).sum()
            ranks = rng.choice(num_ranks, size=experts, p=shares)
        layer[np.arange(experts), ranks] = True
        if kind == "replicas":
            layer |= rng.random(layer.shape) < 0.3
    num_nodes = 2 if num_ranks % 2 == 0 else 1
    return PlacementPlan.from_hosts(
        hosts,
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=num_nodes, ranks_per_node=num_ranks // num_nodes),
        strategy=Strategy(name=kind),
    )


class measuring_errors:  # noqa: N801
    """How far the logits this rank samples from are from the reference's."""

    def __init__(self, model):
        self.model = model
        self.errors = {}
        self.sample = exflow.runtime.steps.sample

    def __enter__(self):
        exflow.runtime.steps.sample = self.sample_and_measure
        return self.errors

    def __exit__(self, *_):
        exflow.runtime.steps.sample = self.sample

    def sample_and_measure(self, logits, *args, request_indices, positions, **others):
        for row, (index, position) in enumerate(
            zip(request_indices.tolist(), positions.tolist(), strict=True)
        ):
            step = position - len(PROMPTS[index])
            expected = self.model.logits[index][step]
            difference = np.abs(logits[row].numpy() - expected).max()
            self.errors[index, step] = float(difference / max(1.0, np.abs(expected).max()))
        return self.sample(
            logits, *args, request_indices=request_indices, positions=positions, **others
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_as_their_reference_for_every_plan_and_protocol(family, models, decoded):
    model = models[family]
    steps = {(i, step) for i, made in enumerate(model.tokens) for step in range(len(made))}
    for number, way in enumerate(decoded.ways):
        results = [by_family[family][number] for by_family in decoded.by_rank]
        assert all(result.tokens == model.tokens for result in results), way
        errors = {key: error for result in results for key, error in result.errors.items()}
        assert set(errors) == steps, way
        assert max(errors.values()) <= LARGEST_ERROR, way


@pytest.mark.parametrize("family", FAMILIES)
def test_families_send_the_rows_that_the_planner_counts(family, decoded):
    for number, way in enumerate(decoded.ways):
        for measured, counted in decoded.by_rank[0][family][number].rows:
            assert np.array_equal(measured, counted), way


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_tested_where_greedy_tokens_are_far_from_ties(family, models):
    for logits in models[family].logits:
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > SMALLEST_MARGIN
