"""Statistics and stability: traces whose affinity is known, then properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import stability, statistics
from placement.affinity import AffinityGraph, count_transitions
from placement.stability import agreement_table, convergence, describe_stability, quick_placement
from placement.statistics import describe
from placement.trace import RoutingTrace, TraceError

EXPERTS = 8


def chain_trace(tokens=4000, *, noise=0.0, layers=3, seed=0, shift=1, length=20, **fields):
    """Top-1: expert e is followed by e + shift, or, with probability `noise`, by any."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, 1), dtype=np.int16)
    ids[:, 0, 0] = rng.integers(0, EXPERTS, tokens)
    for layer in range(1, layers):
        follows = (ids[:, layer - 1, 0] + shift) % EXPERTS
        strays = rng.random(tokens) < noise
        ids[:, layer, 0] = np.where(strays, rng.integers(0, EXPERTS, tokens), follows)
    return RoutingTrace(
        expert_ids=ids,
        sequence_ids=(np.arange(tokens) // length).astype(np.int32),
        num_experts=EXPERTS,
        model="toy",
        layer_ids=tuple(range(layers)),
        **fields,
    )


def pair_trace(tokens=4000, seed=0):
    """Top-2: experts 2i and 2i + 1 are always used together, a new pair at every layer."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, EXPERTS // 2, (tokens, 3, 1)) * 2
    ids = np.concatenate([first, first + 1], axis=2).astype(np.int16)
    sequences = (np.arange(tokens) // 20).astype(np.int32)
    return RoutingTrace(
        expert_ids=ids, sequence_ids=sequences, num_experts=8, model="toy", layer_ids=(0, 1, 2)
    )


def test_full_affinity_is_one_and_its_null_is_near_zero():
    figures = describe(chain_trace())
    information = figures["mutual_information"]["top1"]
    assert information["mean"] == pytest.approx(1.0)
    assert information["null"] < 0.01
    assert information["null_within_sequence"] < 0.01
    assert figures["concentration"]["effective_successors"]["mean"] == pytest.approx(1.0)
    assert figures["concentration"]["top_successor"]["mean"] == pytest.approx(1.0)
    assert figures["load_skew"]["max"] < 1.2
    assert figures["coactivation"] is None


def test_no_affinity_is_what_the_null_is():
    information = describe(chain_trace(noise=1.0))["mutual_information"]["top1"]
    assert information["mean"] == pytest.approx(information["null"], abs=0.003)


def test_a_topic_shows_in_the_null_within_sequences():
    """Each sequence uses one expert per layer: shuffling its tokens changes nothing."""
    sequence_ids = np.arange(2000) // 20
    rng = np.random.default_rng(0)
    by_sequence = rng.permutation(100)[:, None] % EXPERTS + np.zeros((100, 3), dtype=int)
    trace = RoutingTrace(
        expert_ids=by_sequence[sequence_ids][:, :, None].astype(np.int16),
        sequence_ids=sequence_ids.astype(np.int32),
        num_experts=EXPERTS,
        model="toy",
        layer_ids=(0, 1, 2),
    )
    information = describe(trace)["mutual_information"]["top1"]
    assert information["null_within_sequence"] == pytest.approx(information["mean"])
    assert information["null"] < 0.02


def test_what_is_foretold_is_counted_whatever_its_order():
    trace = pair_trace()
    assert describe(trace)["foretold"] is None
    right = trace.expert_ids[:, 0, ::-1]
    half = np.where(np.arange(trace.num_tokens)[:, None] % 2, right, (right + 2) % EXPERTS)
    for foretold, share in ((right, 1.0), (half, 0.5)):
        figures = describe(replace(trace, foretold_ids=foretold.astype(np.int16)))["foretold"]
        assert figures["share"] == share
        assert figures["null"] == pytest.approx(0.25, abs=0.03)


def test_coactivation_of_fixed_pairs_is_far_from_independence():
    """Of the 28 pairs of 8 experts only 4 occur: 1 - 4/28 of the mass is beyond load."""
    figures = describe(pair_trace())
    assert figures["coactivation"]["mean"] == pytest.approx(1 - 4 / 28, abs=0.01)
    assert figures["coactivation"]["null"] < 0.05
    assert figures["mutual_information"]["topk"]["mean"] < 0.01


@given(st.integers(0, 20))
def test_independent_choices_have_no_coactivation_whatever_the_load(seed):
    rng = np.random.default_rng(seed)
    weights = rng.random(6) + 0.1
    pairs = np.outer(weights, weights) * (1 - np.eye(6))
    counts = (pairs / pairs.sum() * 1e9).astype(np.int64)
    assert statistics.coactivation_excess(counts[None])[0] < 1e-3


def test_shuffling_within_sequences_keeps_what_each_sequence_uses():
    trace = chain_trace(tokens=100)
    shuffled = statistics.shuffled_within_sequences(trace)
    assert (shuffled.expert_ids != trace.expert_ids).any()
    for sequence in range(5):
        mine = trace.sequence_ids == sequence
        for layer in range(3):
            np.testing.assert_array_equal(
                np.sort(shuffled.expert_ids[mine, layer, 0]),
                np.sort(trace.expert_ids[mine, layer, 0]),
            )


def test_the_quick_placement_finds_a_perfect_chain():
    transitions = count_transitions(chain_trace(shift=3))
    ranks = quick_placement(transitions, 4)
    assert stability.kept(ranks, transitions) == 1.0
    for layer in ranks:
        assert np.bincount(layer).tolist() == [2, 2, 2, 2]


@given(st.integers(0, 20), st.integers(2, 8))
def test_the_quick_placement_is_even_and_not_worse_than_placing_in_order(seed, num_ranks):
    transitions = np.random.default_rng(seed).integers(0, 50, (3, EXPERTS, EXPERTS))
    ranks = quick_placement(transitions, num_ranks)
    counts = np.array([np.bincount(layer, minlength=num_ranks) for layer in ranks])
    assert counts.max() - counts.min() <= 1
    in_order = np.tile(np.arange(EXPERTS) * num_ranks // EXPERTS, (4, 1))
    assert stability.kept(ranks, transitions) >= stability.kept(in_order, transitions)


def test_texts_of_one_kind_agree_and_of_different_kinds_do_not():
    same = agreement_table({"a": chain_trace(), "b": chain_trace(seed=1)}, 4)
    assert np.array(same["correlation"]).min() > 0.99
    assert same["transfer"] == pytest.approx(1.0)
    apart = agreement_table({"a": chain_trace(), "b": chain_trace(shift=3)}, 4)
    assert apart["correlation"][0][0] > 0.99
    assert apart["correlation"][0][1] < 0.0
    assert apart["transfer"] < 0.6


def test_more_tokens_tell_more():
    rows = convergence(chain_trace(noise=0.7), 4)
    assert [row["tokens"] for row in rows] == [125, 250, 500, 1000, 2000]
    correlations = [row["correlation"] for row in rows]
    assert correlations == sorted(correlations)
    assert rows[-1]["kept"] > rows[0]["kept"]


def test_domains_with_few_tokens_are_left_out():
    domain_ids = np.repeat(np.array([0, 1, 2], dtype=np.uint8), [1900, 1900, 200])
    trace = chain_trace(domain_ids=domain_ids, domains=("a", "b", "few", "none"))
    figures = describe_stability(trace)
    assert figures["domains"]["names"] == ["a", "b"]
    assert figures["against"] is None
    assert describe(trace)["domains"] == {"a": 1900, "b": 1900, "few": 200, "none": 0}


def test_one_layer_has_no_affinity_between_layers():
    with pytest.raises(TraceError, match="the trace has one"):
        describe_stability(chain_trace(layers=1))


def test_loads_do_not_pass_for_affinity():
    """Two traces with the same uneven load and no affinity: their correlation is noise."""
    rng = np.random.default_rng(0)
    popularity = np.arange(1, 9) ** 2 / (np.arange(1, 9) ** 2).sum()
    traces = [
        RoutingTrace(
            expert_ids=rng.choice(8, p=popularity, size=(5000, 8, 1)).astype(np.int16),
            sequence_ids=np.arange(5000, dtype=np.int32),
            num_experts=8,
            model="toy",
            layer_ids=tuple(range(8)),
        )
        for _ in range(2)
    ]
    one, other = (AffinityGraph.from_trace(trace).transitions for trace in traces)
    assert abs(stability.correlate(one, other)) < 0.2
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.9


def test_one_layer_has_no_affinity_to_describe():
    with pytest.raises(TraceError, match="the trace has only one"):
        describe(chain_trace(100, layers=1))
