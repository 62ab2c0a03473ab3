"""Replicated dispatch: one message a layer, no keys and values shared, the same tokens."""

from dataclasses import replace

import numpy as np
import pytest

from decoding import (
    PROMPTS,
    check_logits,
    check_traffic,
    decode,
    decode_all,
    make_case,
    make_plan,
    save_model,
)
from harness import run_ranks
from tiny_checkpoints import qwen2_moe

pytestmark = pytest.mark.distributed


def replicated(case):
    return replace(case, options=replace(case.options, dispatch="replicated"))


@pytest.fixture(scope="module", params=[1, 3])
def model(request, tmp_path_factory):
    """With a shared expert."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(qwen2_moe, folder, num_experts_per_tok=request.param)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tokens_logits_rows_and_messages_are_right_for_every_plan(model, num_ranks):
    kinds = ("linear", "copies") if num_ranks > 1 else ("linear",)
    plans = [make_plan(model.definition, num_ranks, kind) for kind in kinds]
    cases = [replicated(make_case(plan, "coherent")) for plan in plans]
    by_rank = run_ranks(num_ranks, decode_all, model, cases, timeout=280)
    for number, case in enumerate(cases):
        results = [results[number] for results in by_rank]
        assert all(result.tokens == model.tokens for result in results)
        logits = {key: row for result in results for key, row in result.logits.items()}
        check_logits(logits, model)
        check_traffic(results[0], case)
        if num_ranks > 1:
            check_messages(results[0].decode, model.definition, num_ranks)


def check_messages(decode, definition, num_ranks):
    """One a layer and one a step; bytes are those of partial sums and new tokens."""
    steps, layers = decode["steps"], len(definition.moe_layer_ids)
    assert decode["messages"] == {"combine": steps * layers, "share": steps}
    rows = decode["tokens"] * layers * num_ranks * (num_ranks - 1)
    counted = {kind: count for kind, count in decode["bytes"].items() if count}
    assert counted == {
        "payload": rows * definition.hidden_size * 4,
        "tokens": decode["tokens"] * 8 * (num_ranks - 1),
    }


def test_the_same_experts_are_recorded_as_at_home(model):
    plan = make_plan(model.definition, 2, "copies")
    cases = [make_case(plan, "home"), replicated(make_case(plan, "coherent"))]
    home, same = run_ranks(2, decode_all, model, cases)[0]
    assert home.tokens == same.tokens
    assert np.array_equal(home.trace.expert_ids, same.trace.expert_ids)
    assert np.array_equal(home.trace.positions, same.trace.positions)


def test_few_requests_leave_ranks_without_tokens_of_their_own(model):
    case = replicated(make_case(make_plan(model.definition, 4, "random"), "coherent", batch_size=1))
    result = run_ranks(4, decode_two, model, case)[0]
    assert result.tokens == model.tokens[:2]
    check_traffic(result, case)


def decode_two(model, case):
    return decode(model, case, PROMPTS[:2])


def test_sampled_tokens_do_not_depend_on_replication(model):
    params = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
    plan = make_plan(model.definition, 2, "random")
    case = make_case(plan, "coherent", **params)
    moving, still = run_ranks(2, decode_all, model, [case, replicated(case)])[1]
    assert moving.tokens == still.tokens
