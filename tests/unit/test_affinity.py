"""The affinity graph: pair counts of small traces whose answer is plain, and against a slow count."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import placement.cli
from placement.affinity import AffinityGraph
from placement.trace import RoutingTrace, TraceError


def make_trace(expert_ids, num_experts, sequence_ids=None, **fields) -> RoutingTrace:
    ids = np.array(expert_ids, dtype=np.int16)
    sequences = np.arange(len(ids)) if sequence_ids is None else sequence_ids
    return RoutingTrace(
        expert_ids=ids,
        sequence_ids=np.asarray(sequences, dtype=np.int32),
        num_experts=num_experts,
        model="toy",
        layer_ids=tuple(range(ids.shape[1])),
        **fields,
    )


def random_trace(seed=0, tokens=60, layers=3, top_k=2, num_experts=5, **fields) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, num_experts)).argsort(axis=2)[:, :, :top_k]
    return make_trace(ids, num_experts, np.arange(tokens) // 7, **fields)


def test_pairs_of_three_tokens():
    trace = make_trace([[[0, 1], [2, 0]], [[1, 0], [2, 1]], [[2, 0], [2, 0]]], 3)
    graph = AffinityGraph.from_trace(trace)
    assert graph.load.tolist() == [[3, 2, 1], [2, 1, 3]]
    assert graph.transitions.tolist() == [[[2, 1, 3], [1, 1, 2], [1, 0, 1]]]
    assert graph.coactivation[0].tolist() == [[0, 2, 1], [2, 0, 0], [1, 0, 0]]
    assert graph.coactivation[1].tolist() == [[0, 0, 2], [0, 0, 1], [2, 1, 0]]
    np.testing.assert_allclose(graph.probabilities()[0, 0], [1 / 3, 1 / 6, 1 / 2])


@given(st.integers(0, 10), st.integers(1, 4))
def test_counts_equal_a_plain_loop(seed, top_k):
    trace = random_trace(seed, top_k=top_k)
    graph = AffinityGraph.from_trace(trace)
    transitions, coactivation = np.zeros((2, 5, 5)), np.zeros((3, 5, 5))
    for token in trace.expert_ids.tolist():
        for layer, chosen in enumerate(token):
            for i in chosen:
                for j in chosen:
                    coactivation[layer, i, j] += i != j
                for j in token[layer + 1] if layer < 2 else []:
                    transitions[layer, i, j] += 1
    np.testing.assert_array_equal(graph.transitions, transitions)
    np.testing.assert_array_equal(graph.coactivation, coactivation)
    assert graph.load.sum() == 60 * 3 * top_k


def test_an_expert_nobody_uses_has_no_successors():
    graph = AffinityGraph.from_trace(make_trace([[[0], [1]]], 2))
    assert graph.probabilities().tolist() == [[[0, 1], [0, 0]]]


def test_the_networkx_graph_holds_loads_weights_and_probabilities():
    graph = AffinityGraph.from_trace(make_trace([[[0], [1]], [[0], [1]], [[0], [0]]], 2))
    found = graph.to_networkx()
    assert found.graph["num_tokens"] == 3
    assert dict(found.nodes(data="load")) == {(0, 0): 3, (0, 1): 0, (1, 0): 1, (1, 1): 2}
    assert set(found.edges) == {((0, 0), (1, 0)), ((0, 0), (1, 1))}
    assert found.edges[(0, 0), (1, 1)] == {"weight": 2, "probability": pytest.approx(2 / 3)}


def run_affinity(*arguments):
    app = placement.cli.make_app("test")
    placement.cli.mount(app, {"affinity": "placement.commands.affinity"})
    return CliRunner().invoke(app, ["affinity", *map(str, arguments)])


@pytest.fixture
def two_domains(tmp_path):
    rng = np.random.default_rng(0)
    domain_ids = (np.arange(3000) // 7 % 2).astype(np.uint8)
    trace = random_trace(tokens=3000, domain_ids=domain_ids, domains=("code", "prose"))
    path = tmp_path / "both.safetensors"
    trace.save(path)
    return path, trace, rng


def test_the_command_prints_tables(two_domains):
    result = run_affinity(two_domains[0], "--ranks", 2)
    assert result.exit_code == 0, result.output
    assert "3000 tokens of 429 sequences, 3 MoE layers, top-2 of 5" in result.output
    assert "mutual information, first choices" in result.output
    assert "2 prose" in result.output


def test_the_command_emits_one_json_object(two_domains, tmp_path):
    path, trace, _ = two_domains
    trace.domain("code").save(tmp_path / "code.safetensors")
    result = run_affinity(path, "--json", "--top1", "--against", tmp_path / "code.safetensors")
    figures = json.loads(result.output)
    assert figures["top_k"] == 1
    assert figures["coactivation"] is None
    assert figures["stability"]["domains"]["names"] == ["code", "prose"]
    assert figures["stability"]["against"]["names"] == ["this", "other"]
    assert len(figures["mutual_information"]["top1"]["per_layer"]) == 2


def test_a_trace_of_another_model_is_refused(two_domains, tmp_path):
    random_trace(num_experts=4).save(tmp_path / "other.safetensors")
    result = run_affinity(two_domains[0], "--against", tmp_path / "other.safetensors")
    assert isinstance(result.exception, TraceError)
    assert "num_experts is 5 in one, 4 in the other" in str(result.exception)
    replace(random_trace(), model="else").save(tmp_path / "else.safetensors")
    result = run_affinity(two_domains[0], "--against", tmp_path / "else.safetensors")
    assert isinstance(result.exception, TraceError)
    assert "model is toy in one, else in the other" in str(result.exception)
