"""Decode on real gloo ranks: plans, protocols and world sizes change traffic, never tokens."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from tiny_checkpoints import decode_with_transformers, make_prompts, olmoe, qwen3_moe

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
PROMPTS = make_prompts([5, 17, 1, 30, 8, 3, 9])
NEW_TOKENS = 5
MODELS = {
    "qwen3-top1": (qwen3_moe, {"num_experts_per_tok": 1}),
    "qwen3-top3": (qwen3_moe, {"num_experts_per_tok": 3, "mlp_only_layers": [1]}),
    "olmoe-top2": (olmoe, {"num_hidden_layers": 2}),
}


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


@dataclass(frozen=True)
class Result:
    """What came of it, on one rank."""

    tokens: list
    logits: dict
    decode: dict
    trace: object


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    save, changes = MODELS[request.param]
    folder = save(tmp_path_factory.mktemp("model") / "tiny", **changes)
    reference = decode_with_transformers(folder, PROMPTS, NEW_TOKENS)
    logits = [part.numpy() for part in reference.logits]
    return Model(str(folder), define_model(folder), reference.tokens, logits)


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


def decode(model, case, prompts=PROMPTS):
    """Decode on this rank and the others."""
    ranks, definition = Ranks.from_environment(), model.definition
    weights = load_weights(
        Checkpoint(model.folder),
        definition,
        [layer[ranks.rank] for layer in case.plan.slots],
        dtype=torch.float32,
        device=CPU,
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
    by_rank = ranks.gather(engine.metrics["decode"].to_json(), CPU)
    return Result(
        tokens=[tokens[index] for index in range(len(prompts))],
        logits=logits,
        decode=join_phases(by_rank),
        trace=recorder.gather(ranks, CPU, source="test"),
    )


class keeping_logits:  # noqa: N801
    """Logits by (request, position), of what this rank samples."""

    def __init__(self, logits):
        self.logits = logits
        self.sample = exflow.runtime.steps.sample

    def __enter__(self):
        exflow.runtime.steps.sample = self.sample_and_keep

    def __exit__(self, *_):
        exflow.runtime.steps.sample = self.sample

    def sample_and_keep(self, logits, params, *, request_indices, positions):
        keys = zip(request_indices.tolist(), positions.tolist(), strict=True)
        self.logits.update({key: logits[row].numpy().copy() for row, key in enumerate(keys)})
        return self.sample(logits, params, request_indices=request_indices, positions=positions)


def decode_all(model, cases):
    return [decode(model, case) for case in cases]


def check_traffic(result, case):
    traffic = count_traffic(
        result.trace,
        case.plan,
        protocol=case.options.protocol,
        coherence_domain=case.options.coherence_domain,
    )
    assert np.array_equal(result.decode["rows"]["dispatch"], traffic.dispatch)
    assert np.array_equal(result.decode["rows"]["combine"], traffic.combine)
    return traffic


def protocols(num_ranks):
    domains = sorted({1, min(2, num_ranks), num_ranks})
    return [("home", None), *[("coherent", domain) for domain in domains]]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tokens_logits_and_rows_are_right_for_every_plan_and_protocol(model, num_ranks):
    kinds = ("linear", "copies") if num_ranks > 1 else ("linear",)
    plans = [make_plan(model.definition, num_ranks, kind) for kind in kinds]
    cases = [make_case(plan, *protocol) for plan in plans for protocol in protocols(num_ranks)]
    by_rank = run_ranks(num_ranks, decode_all, model, cases, timeout=280)
    for number, case in enumerate(cases):
        results = [results[number] for results in by_rank]
        assert all(result.tokens == model.tokens for result in results)
        logits = {key: row for result in results for key, row in result.logits.items()}
        check_logits(logits, model)
        check_traffic(results[0], case)


def check_logits(found, model):
    for index, expected in enumerate(model.logits):
        scale = max(1.0, float(np.abs(expected).max()))
        for step, row in enumerate(expected):
            difference = np.abs(found[index, len(PROMPTS[index]) + step] - row).max()
            assert difference <= 1e-5 * scale


@pytest.fixture(scope="module")
def on_two_ranks(model):
    """The same plan under home, and coherent with domains of one rank and of two."""
    plan = make_plan(model.definition, 2, "random")
    cases = [
        make_case(plan, *protocol) for protocol in (("home",), ("coherent", 1), ("coherent", 2))
    ]
    return run_ranks(2, decode_all, model, cases)[0]


def test_a_domain_of_one_rank_is_home(on_two_ranks):
    home, alone, _ = on_two_ranks
    assert home.tokens == alone.tokens
    assert home.decode["rows"] == alone.decode["rows"]
    assert home.decode["messages"] == alone.decode["messages"]
    assert alone.decode["bytes"]["kv_share"] == 0
    for key, row in home.logits.items():
        assert np.abs(row - alone.logits[key]).max() <= 1e-5 * max(1.0, np.abs(row).max())


def test_messages_a_step(model, on_two_ranks):
    """Counts and rows a layer; partial sums where they travel; one exchange at the end."""
    home, _, coherent = on_two_ranks
    layers = len(model.definition.moe_layer_ids)
    for result in (home, coherent):
        steps, messages = result.decode["steps"], result.decode["messages"]
        assert steps > 0
        assert messages["dispatch"] == messages["counts"] == steps * layers
        assert messages["share"] == steps
    assert home.decode["messages"]["combine"] == home.decode["steps"] * layers
    has_combine = model.definition.top_k > 1
    assert ("combine" in coherent.decode["messages"]) == has_combine
    assert (np.sum(coherent.decode["rows"]["combine"]) > 0) == has_combine


def test_bytes_are_rows_times_their_width(model, on_two_ranks):
    definition, (_, _, result) = model.definition, on_two_ranks
    rows = {kind: int(np.sum(counts)) for kind, counts in result.decode["rows"].items()}
    counted = result.decode["bytes"]
    assert counted["payload"] == sum(rows.values()) * definition.hidden_size * 4
    assert counted["metadata"] == rows["dispatch"] * (2 * definition.top_k + 2) * 4
    assert counted["tokens"] == result.decode["tokens"] * 8
    entries = result.decode["tokens"] * definition.num_layers
    assert counted["kv_share"] == entries * (8 + definition.kv_width * 4)


def test_few_requests_leave_ranks_without_tokens(model):
    """One request on four ranks, and one that joins when another leaves."""
    plan = make_plan(model.definition, 4, "random", seed=1)
    cases = [make_case(plan, protocol, domain, batch_size=1) for protocol, domain in protocols(4)]
    for result, case in zip(run_ranks(4, decode_two, model, cases)[0], cases, strict=True):
        assert result.tokens == model.tokens[:2]
        check_traffic(result, case)


def decode_two(model, cases):
    return [decode(model, case, PROMPTS[:2]) for case in cases]


def test_sampled_tokens_do_not_depend_on_ranks_or_protocol(model):
    params = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
    alone = run_ranks(
        1, decode_all, model, [make_case(make_plan(model.definition, 1, "linear"), **params)]
    )
    plan = make_plan(model.definition, 2, "random")
    cases = [make_case(plan, *protocol, **params) for protocol in protocols(2)]
    for result in run_ranks(2, decode_all, model, cases)[1]:
        assert result.tokens == alone[0][0].tokens


def test_plans_change_traffic_and_never_tokens(model):
    outcomes = run_ranks(2, check_random_plans, model)
    assert outcomes[0] == outcomes[1]
    assert len(set(outcomes[0])) > 1, "all plans cost the same"


def check_random_plans(model):
    """The property, on every rank in step: hypothesis draws the same examples everywhere."""
    totals = []

    @settings(max_examples=5, derandomize=True, database=None, deadline=None)
    @given(
        seed=st.integers(0, 99),
        kind=st.sampled_from(["random", "copies"]),
        protocol=st.sampled_from(protocols(2)),
        batch_size=st.integers(1, 7),
    )
    def property_holds(seed, kind, protocol, batch_size):
        plan = make_plan(model.definition, 2, kind, seed)
        case = make_case(plan, *protocol, batch_size=batch_size)
        result = decode(model, case)
        assert result.tokens == model.tokens
        totals.append(check_traffic(result, case).rows_per_token()["total"])

    property_holds()
    return totals


def test_ranks_agree_on_an_error_that_one_of_them_has():
    outcomes = run_ranks(2, fail_on_rank_one)
    assert outcomes == [
        ("RankFailureError", "rank 1 cannot go on: my shard is damaged"),
        ("CheckpointError", "my shard is damaged"),
    ]


def fail_on_rank_one():
    from exflow.errors import CheckpointError

    ranks = Ranks.from_environment()
    try:
        with ranks.agreeing(CPU):
            if ranks.rank == 1:
                message = "my shard is damaged"
                raise CheckpointError(message)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None


def test_values_of_all_ranks_are_gathered_in_order():
    assert run_ranks(2, gather_something)[1] == [{"rank": 0}, {"rank": 1, "more": [1, 2]}]


def gather_something():
    ranks = Ranks.from_environment()
    return ranks.gather({"rank": 0} if ranks.is_first else {"rank": 1, "more": [1, 2]}, CPU)
