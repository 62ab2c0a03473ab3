"""Backends, links, homing: what rows cost in time."""

import json

import numpy as np
import pytest

from placement.homing import choose_homes
from placement.strategies import get_strategy
from placement.timing import (
    BACKENDS,
    Links,
    Shape,
    TimingError,
    advise,
    caution,
    kv_seconds,
    replicated_rows,
    rows_by_kind,
    step_seconds,
    why_no_gain,
)
from placement.topology import Topology
from placement.traffic import count_traffic
from planted import planted_trace

SHAPE = Shape(hidden_size=1000, kv_elements=100, element_bytes=2, tokens_per_rank=10)


@pytest.fixture(scope="module")
def trace():
    return planted_trace(experts=16, top_k=2)


@pytest.fixture(scope="module")
def plan(trace):
    return get_strategy("linear")(trace, Topology(num_nodes=2, ranks_per_node=2))


def test_deduplicating_backends_send_what_the_traffic_model_counts(trace, plan):
    rows = count_traffic(trace, plan, protocol="home").rows_per_token()
    by_rank = rows_by_kind(trace, plan, backend="nccl-ep", protocol="home")
    assert by_rank["inter"] == pytest.approx(rows["inter_node"])
    assert sum(by_rank.values()) == pytest.approx(rows["total"])
    by_node = rows_by_kind(trace, plan, backend="exflow", protocol="home")
    assert by_node["inter"] == pytest.approx(rows["inter_node_dedup"])


def test_a_backend_without_deduplication_sends_a_row_an_expert(trace, plan):
    rows = rows_by_kind(trace, plan, backend="deepep-ll", protocol="home")
    home = trace.sequence_ids % 4
    ranks = trace.expert_ids // 4
    remote = (ranks != home[:, None, None]).sum() * 2 / trace.num_tokens
    assert sum(rows.values()) == pytest.approx(remote)


def test_allgather_sends_the_same_rows_whatever_the_plan(trace, plan):
    other = get_strategy("random")(trace, plan.topology)
    first, second = (rows_by_kind(trace, p, backend="agrs", protocol="home") for p in (plan, other))
    assert first == second == {"intra": 8.0, "inter": 16.0}
    without_gain = {
        has_copies: [b for b in BACKENDS if why_no_gain(b, has_copies=has_copies)]
        for has_copies in (True, False)
    }
    assert without_gain == {
        True: ["deepspeed", "agrs"],
        False: ["deepep-ll", "pplx", "deepspeed", "agrs"],
    }


def test_links_say_what_a_row_inside_a_node_costs():
    assert Links().intra_node_cost == pytest.approx(1 / 9)
    assert Links(intra_bandwidth=2.0, inter_bandwidth=1.0).intra_node_cost == 0.5
    assert Links(intra_bandwidth=1.0, inter_bandwidth=8.0).intra_node_cost == 1.0


def test_replicated_rows_are_those_that_the_traffic_model_counts(trace, plan):
    traffic = count_traffic(trace, plan, dispatch="replicated").rows_per_token()
    rows = replicated_rows(plan)
    assert rows["inter"] == traffic["inter_node"] > 0
    assert rows["intra"] + rows["inter"] == traffic["total"]


def test_a_step_takes_latency_and_bytes_over_bandwidth(plan):
    links = Links(intra_latency=1e-6, intra_bandwidth=1e9, inter_latency=2e-6, inter_bandwidth=1e8)
    seconds = step_seconds({"intra": 5.0, "inter": 1.0}, plan, shape=SHAPE, links=links)
    assert seconds == pytest.approx(4 * 2 * 2e-6 + 1.0 * 20_000 / 1e8)


def test_advice_names_home_and_every_domain_for_exflow_and_home_alone_for_others(trace, plan):
    choices = advise(trace, plan, backend="exflow", shape=SHAPE, links=Links())
    assert sorted(c["coherence_domain"] for c in choices) == [1, 2, 4]
    assert choices == sorted(choices, key=lambda c: caution(c["step_us"], c["protocol"]))
    others = advise(trace, plan, backend="pplx", shape=SHAPE, links=Links())
    assert [c["protocol"] for c in others] == ["home"]


def test_large_caches_make_coherence_lose(trace, plan):
    heavy = Shape(hidden_size=1000, kv_elements=1_000_000, tokens_per_rank=1000)
    best = advise(trace, plan, backend="exflow", shape=heavy, links=Links())[0]
    assert best["protocol"] == "home"


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"speed": 3}', '{"intra_bandwidth": 0}', '{"inter_latency": "x"}']
)
def test_links_that_cannot_be_read_are_refused(text, tmp_path):
    (tmp_path / "links.json").write_text(text)
    with pytest.raises(TimingError):
        Links.load(tmp_path / "links.json")


def test_links_of_the_user_replace_the_defaults(tmp_path):
    (tmp_path / "links.json").write_text(json.dumps({"inter_bandwidth": 1e10}))
    links = Links.load(tmp_path / "links.json")
    assert links.inter_bandwidth == 1e10
    assert links.intra_bandwidth == Links().intra_bandwidth


def test_an_unknown_backend_is_refused(trace, plan):
    with pytest.raises(TimingError, match="deepep-ll"):
        rows_by_kind(trace, plan, backend="mpi", protocol="home")


def test_homes_chosen_from_first_tokens_save_rows_and_share_requests(trace):
    # Every sequence keeps to one topic here, so its first tokens tell where it belongs.
    topical = planted_trace(experts=16, top_k=2, noise=0.0, topics=4)
    topic = topical.expert_ids[:, 0, 0] // 1
    sequence = np.unique(topical.expert_ids[:, 0].min(axis=1) * 0 + topic, return_inverse=True)[1]
    from dataclasses import replace

    topical = replace(topical, sequence_ids=sequence.astype(np.int32))
    plan = get_strategy("linear")(topical, Topology(num_nodes=1, ranks_per_node=4))
    homes = choose_homes(topical, plan, first_tokens=5, max_imbalance=1.5)
    rows = [
        count_traffic(topical, plan, protocol="home", homes=h).rows_per_token()["total"]
        for h in (None, homes)
    ]
    assert rows[1] < rows[0]
    of_sequence = [np.unique(homes[sequence == s]) for s in np.unique(sequence)]
    assert all(len(ranks) == 1 for ranks in of_sequence)
    requests = np.bincount(np.concatenate(of_sequence), minlength=4)
    assert requests.max() <= np.ceil(1.5 * len(of_sequence) / 4)


def test_keys_and_values_cross_to_each_rank_or_once_to_its_node(plan):
    links = Links(intra_bandwidth=1e6, inter_bandwidth=1e3)
    sent = 100 * 2 * 10 * 4  # elements, bytes, tokens, layers
    flat = kv_seconds(plan, 4, shape=SHAPE, links=links)
    once = kv_seconds(plan, 4, shape=SHAPE, links=links, dispatch="hierarchical")
    assert flat == pytest.approx(2 * sent / 1e3)
    assert once == pytest.approx(sent / 1e3)
    inside = Links(intra_bandwidth=1.0, inter_bandwidth=1e9)
    # its own to its neighbour, and another node's which it passes on
    passed = kv_seconds(plan, 4, shape=SHAPE, links=inside, dispatch="hierarchical")
    assert passed == pytest.approx(2 * sent)
    for dispatch in ("flat", "hierarchical"):
        assert kv_seconds(plan, 2, shape=SHAPE, links=inside, dispatch=dispatch) == sent
        assert kv_seconds(plan, 1, shape=SHAPE, links=inside, dispatch=dispatch) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "too deeply nested"),
        ('{"inter_latency": ' + "9" * 5000 + "}", "too many digits"),
        ('{"inter_latency": ' + "9" * 400 + "}", "too large"),
        ('{"inter_bandwidth": Infinity}', "above 0 and finite, got inf"),
        ('{"inter_bandwidth": NaN}', "above 0 and finite, got nan"),
    ],
)
def test_links_that_cannot_be_read_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "links.json").write_text(text)
    with pytest.raises(TimingError, match=rf"links\.json: links are JSON with .*{message}"):
        Links.load(tmp_path / "links.json")
