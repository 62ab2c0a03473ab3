"""Hierarchical dispatch on four ranks as two nodes: fewer rows cross, the tokens are the same."""

from dataclasses import replace

import numpy as np
import pytest

from decoding import (
    check_logits,
    check_traffic,
    decode,
    decode_all,
    make_case,
    make_plan,
    protocols,
    save_model,
    sharing_at_once,
)
from harness import run_ranks
from placement.traffic import count_traffic
from tiny_checkpoints import make_prompts, qwen3_moe

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(qwen3_moe, tmp_path_factory.mktemp("model"), num_experts_per_tok=4)


@pytest.mark.parametrize("kind", ["linear", "random", "copies"])
def test_tokens_logits_and_every_link_s_rows_are_right(model, kind):
    plan = make_plan(model.definition, 4, kind)
    cases = [make_case(plan, *protocol) for protocol in protocols(4)]
    cases = [
        replace(case, options=replace(case.options, dispatch="hierarchical")) for case in cases
    ]
    if kind == "random":
        cases = [sharing_at_once(case) for case in cases]
    by_rank = run_ranks(4, decode_all, model, cases, timeout=280)
    node = plan.topology.node_of_rank
    crosses = node[:, None] != node
    saved = 0
    for number, case in enumerate(cases):
        results = [results[number] for results in by_rank]
        assert all(result.tokens == model.tokens for result in results)
        check_logits({k: row for result in results for k, row in result.logits.items()}, model)
        traffic = check_traffic(results[0], case)
        rows = results[0].decode["rows"]
        crossed = sum(int(np.array(rows[way])[:, crosses].sum()) for way in rows)
        assert crossed == traffic.inter_node_dedup
        saved += traffic.inter_node - crossed
        check_flat(model, results[0], case, traffic)
    assert (saved > 0) == (kind != "copies")  # whose copies leave one rank a node to choose


def test_sampling_in_domains_of_one_rank_is_that_of_home(model):
    """Texts end at different times, so slots are used again and not in order."""
    plan = make_plan(model.definition, 4, "random")
    stops = tuple(range(0, 128, 4))
    sampling = {"temperature": 0.9, "max_tokens": 12, "stop_token_ids": stops, "batch_size": 8}
    cases = [make_case(plan, *protocol, **sampling) for protocol in (("home",), ("coherent", 1))]
    cases = [
        replace(case, options=replace(case.options, dispatch="hierarchical")) for case in cases
    ]
    prompts = make_prompts([3 + number % 5 for number in range(40)])
    home, coherent = run_ranks(4, decode_prompts, model, cases, prompts)[0]
    assert len({len(tokens) for tokens in home.tokens}) > 3
    assert coherent.tokens == home.tokens
    assert coherent.decode["rows"] == home.decode["rows"]


def decode_prompts(model, cases, prompts):
    return [decode(model, case, prompts) for case in cases]


def check_flat(model, result, case, traffic):
    """The same number of rows as in flat dispatch, and two more messages a layer."""
    flat = count_traffic(
        result.trace,
        case.plan,
        protocol=case.options.protocol,
        coherence_domain=case.options.coherence_domain,
    )
    assert traffic.rows_per_token() == flat.rows_per_token()
    assert traffic.dispatch.sum() == flat.dispatch.sum()
    assert traffic.combine.sum() == flat.combine.sum()
    layers = traffic.dispatch.shape[0] * result.decode["steps"]
    messages = result.decode["messages"]
    assert "counts" not in messages
    assert messages["dispatch"] == messages["combine"] == 2 * layers
    is_shared, spans_nodes = case.options.domain_size != 1, case.options.domain_size == 4
    by_layer = is_shared * model.definition.num_layers if case.options.share_bytes == 1 else 0
    shared = by_layer or 1  # messages with keys and values; only those are fanned out
    assert messages["share"] == (1 + by_layer + spans_nodes * shared) * result.decode["steps"]


def test_decode_steps_may_be_flat_where_prompts_and_keys_cross_once(model):
    plan = make_plan(model.definition, 4, "random")
    cases = [make_case(plan, *protocol) for protocol in protocols(4)]
    mixed = {"dispatch": "flat", "prefill_dispatch": "hierarchical"}
    cases = [replace(case, options=replace(case.options, **mixed)) for case in cases]
    by_rank = run_ranks(4, decode_all, model, cases, timeout=280)
    for number, case in enumerate(cases):
        results = [results[number] for results in by_rank]
        assert all(result.tokens == model.tokens for result in results)
        check_logits({k: row for result in results for k, row in result.logits.items()}, model)
        check_traffic(results[0], case)
        decode = results[0].decode
        layers = plan.num_layers * decode["steps"]
        assert decode["messages"]["dispatch"] == decode["messages"]["combine"] == layers
        passed_on = decode["steps"] * (case.options.domain_size not in (1, 2))
        assert decode["messages"]["share"] == decode["steps"] + passed_on


def test_with_one_expert_a_token_only_keys_and_values_are_fanned_out(tmp_path):
    model = save_model(qwen3_moe, tmp_path, num_experts_per_tok=1)
    plan = make_plan(model.definition, 4, "random")
    case = make_case(plan, "coherent", None)
    cases = [
        replace(case, options=replace(case.options, dispatch=dispatch))
        for dispatch in ("flat", "hierarchical")
    ]
    by_rank = run_ranks(4, decode_all, model, cases, timeout=280)
    for result in by_rank[0]:
        assert result.tokens == model.tokens
        check_traffic(result, cases[0])
    flat, fanned = (result.decode for result in by_rank[0])
    assert fanned["rows"] == flat["rows"]
    assert fanned["bytes"] == flat["bytes"]
    more = {"share": 2 * flat["messages"]["share"]}
    assert fanned["messages"] == flat["messages"] | more
