"""Decode on real gloo ranks: plans, protocols and world sizes change traffic, never tokens."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exflow.runtime.wire
from decoding import (
    CPU,
    PROMPTS,
    check_logits,
    check_traffic,
    decode,
    decode_all,
    make_case,
    make_plan,
    protocols,
    save_model,
    sharing_at_once,
    sharing_at_the_end,
)
from exflow.runtime.ranks import Ranks
from harness import run_ranks
from placement.traffic import count_traffic
from tiny_checkpoints import olmoe, qwen3_moe

pytestmark = pytest.mark.distributed

MODELS = {
    "qwen3-top1": (qwen3_moe, {"num_experts_per_tok": 1}),
    "qwen3-top3": (qwen3_moe, {"num_experts_per_tok": 3, "mlp_only_layers": [1]}),
    "olmoe-top2": (olmoe, {"num_hidden_layers": 2}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    save, changes = MODELS[request.param]
    return save_model(save, tmp_path_factory.mktemp("model"), **changes)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tokens_logits_and_rows_are_right_for_every_plan_and_protocol(model, num_ranks):
    kinds = ("linear", "copies") if num_ranks > 1 else ("linear",)
    plans = [make_plan(model.definition, num_ranks, kind) for kind in kinds]
    cases = [make_case(plan, *protocol) for plan in plans for protocol in protocols(num_ranks)]
    cases[-1] = sharing_at_once(cases[-1])
    by_rank = run_ranks(num_ranks, decode_all, model, cases, timeout=280)
    for number, case in enumerate(cases):
        results = [results[number] for results in by_rank]
        assert all(result.tokens == model.tokens for result in results)
        logits = {key: row for result in results for key, row in result.logits.items()}
        check_logits(logits, model)
        check_traffic(results[0], case)


@pytest.fixture(scope="module")
def on_two_ranks(model):
    """The same plan under home, and coherent with domains of one rank and of two."""
    plan = make_plan(model.definition, 2, "random")
    cases = [
        make_case(plan, *protocol) for protocol in (("home",), ("coherent", 1), ("coherent", 2))
    ]
    cases += [sharing_at_once(cases[-1]), sharing_at_the_end(cases[-1])]
    return run_ranks(2, decode_all, model, cases)[0]


def test_a_domain_of_one_rank_is_home(on_two_ranks):
    home, alone, *_ = on_two_ranks
    assert home.tokens == alone.tokens
    assert home.decode["rows"] == alone.decode["rows"]
    assert home.decode["messages"] == alone.decode["messages"]
    assert alone.decode["bytes"]["kv_share"] == 0
    for key, row in home.logits.items():
        assert np.abs(row - alone.logits[key]).max() <= 1e-5 * max(1.0, np.abs(row).max())


def test_tokens_start_away_from_home_where_owners_move(model, on_two_ranks):
    home, _, coherent, *_ = on_two_ranks
    plan = make_plan(model.definition, 2, "random")
    trace = coherent.trace
    assert np.array_equal(trace.foretold_ids, home.trace.foretold_ids)
    from_home = count_traffic(replace(trace, foretold_ids=None), plan).dispatch[0]
    measured = np.asarray(coherent.decode["rows"]["dispatch"])[0]
    assert not np.array_equal(measured, from_home)
    assert np.array_equal(measured, count_traffic(trace, plan).dispatch[0])


def test_messages_a_step(model, on_two_ranks):
    """Rows a layer; partial sums where they travel; one exchange at the end."""
    home, _, coherent, *_ = on_two_ranks
    layers = len(model.definition.moe_layer_ids)
    for result in (home, coherent):
        steps, messages = result.decode["steps"], result.decode["messages"]
        assert steps > 0
        assert messages["dispatch"] == steps * layers
        assert "counts" not in messages
        assert messages["share"] == steps
    assert home.decode["messages"]["combine"] == home.decode["steps"] * layers
    has_combine = model.definition.top_k > 1
    assert ("combine" in coherent.decode["messages"]) == has_combine
    assert (np.sum(coherent.decode["rows"]["combine"]) > 0) == has_combine


def as_with_nccl(model, cases):
    """Sizes are told in a message of their own."""
    exflow.runtime.wire.needs_splits = lambda device: True
    return decode_all(model, cases)


@pytest.mark.parametrize("dispatch", ["flat", "hierarchical"])
def test_where_splits_must_be_known_counts_go_before_rows(model, dispatch):
    """The same tokens, rows and bytes in one more message a layer."""
    plan = make_plan(model.definition, 4, "random")
    cases = [make_case(plan, "home"), make_case(plan, "coherent")]
    cases = [replace(case, options=replace(case.options, dispatch=dispatch)) for case in cases]
    announced = run_ranks(4, as_with_nccl, model, cases)[0]
    for result, together in zip(announced, run_ranks(4, decode_all, model, cases)[0], strict=True):
        steps, layers = result.decode["steps"], len(model.definition.moe_layer_ids)
        assert result.tokens == together.tokens == model.tokens
        assert result.decode["rows"] == together.decode["rows"]
        assert result.decode["bytes"] == together.decode["bytes"]
        assert result.decode["messages"] == together.decode["messages"] | {"counts": steps * layers}


def test_bytes_are_rows_times_their_width(model, on_two_ranks):
    definition, result = model.definition, on_two_ranks[2]
    rows = {kind: int(np.sum(counts)) for kind, counts in result.decode["rows"].items()}
    counted = result.decode["bytes"]
    assert counted["payload"] == sum(rows.values()) * definition.hidden_size * 4
    assert counted["metadata"] == rows["dispatch"] * (2 * definition.top_k + 2) * 4
    layers = result.decode["steps"] * len(definition.moe_layer_ids)
    told = 1 + 2  # rows to come, and tokens that each of two ranks will own
    assert counted["counts"] == 2 * layers * told * 4
    assert counted["tokens"] == result.decode["tokens"] * 8
    entries = result.decode["tokens"] * definition.num_layers
    assert counted["kv_share"] == entries * (4 + definition.kv_width * 4)


def test_keys_and_values_may_arrive_during_the_next_step(model, on_two_ranks):
    """More messages; the same bytes, tokens and logits."""
    with_tokens, at_once, at_the_end = on_two_ranks[2:]
    steps = with_tokens.decode["steps"]
    layers = model.definition.num_layers
    for result, messages in ((at_once, layers), (at_the_end, 1)):
        assert result.decode["messages"]["share"] == steps * (1 + messages)
        assert result.decode["bytes"] == with_tokens.decode["bytes"]
        assert result.tokens == with_tokens.tokens
        assert result.logits.keys() == with_tokens.logits.keys()
        for key, row in result.logits.items():
            assert np.array_equal(row, with_tokens.logits[key])


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
