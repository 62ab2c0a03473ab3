"""Placement plans: files, checks, and what they refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.plan import PlacementPlan, PlanError, Strategy
from placement.topology import Topology, TopologyError


def make_plan(slots, *, num_nodes=1, **fields):
    defaults = {
        "model": "toy",
        "num_experts": 4,
        "layer_ids": tuple(range(len(slots))),
        "topology": Topology(num_nodes=num_nodes, ranks_per_node=len(slots[0]) // num_nodes),
        "strategy": Strategy(name="test", seed=1, options={"max_imbalance": 1.1}),
        "slots": tuple(tuple(tuple(experts) for experts in ranks) for ranks in slots),
    }
    return PlacementPlan(**(defaults | fields))


@st.composite
def plans(draw):
    layers, ranks, experts = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 6)),
    )
    hosts = np.zeros((layers, experts, ranks), dtype=np.bool_)
    for layer in range(layers):
        for expert in range(experts):
            hosts[layer, expert, list(draw(st.sets(st.integers(0, ranks - 1), min_size=1)))] = True
    plan = PlacementPlan.from_hosts(
        hosts,
        model="toy",
        layer_ids=tuple(range(layers)),
        topology=Topology(num_nodes=1, ranks_per_node=ranks),
        strategy=Strategy(name="test"),
    )
    row = tuple(range(ranks))
    return replace(plan, outlook=((row,) * experts,) * layers if draw(st.booleans()) else ())


@given(plans())
def test_hosts_and_slots_say_the_same(plan):
    again = PlacementPlan.from_hosts(
        plan.hosts(),
        model=plan.model,
        layer_ids=plan.layer_ids,
        topology=plan.topology,
        strategy=plan.strategy,
    )
    assert again.slots == plan.slots
    assert plan.has_replicas == (plan.hosts().sum() > plan.num_layers * plan.num_experts)


@given(plan=plans())
def test_a_plan_survives_its_file_byte_for_byte(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("plans")
    plan.save(folder / "a.json")
    loaded = PlacementPlan.load(folder / "a.json")
    loaded.save(folder / "b.json")
    assert loaded == plan
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[[0, 1], [2]]], r"no copy of experts \[3\]"),
        ([[[0, 1], [2, 3, 9]]], r"unknown experts \[9\]"),
        ([[[0, 0, 1], [2, 3]]], "rank 0 lists an expert twice"),
        ([[[0, 1], [2, 3]], [[0, 1, 2, 3]]], "layer 1 lists 1 ranks, expected 2"),
    ],
)
def test_a_plan_that_cannot_serve_is_refused(slots, message):
    with pytest.raises(PlanError, match=message):
        make_plan(slots)


def test_a_plan_refuses_another_job():
    plan = make_plan([[[0, 1], [2, 3]]])
    plan.check_for(model="some/toy", num_experts=4, layer_ids=(0,), num_ranks=2)
    with pytest.raises(PlanError, match="for 2 ranks, this job has 4"):
        plan.check_for(model="toy", num_experts=4, layer_ids=(0,), num_ranks=4)
    with pytest.raises(PlanError, match=r"made for toy .*this model is other: model is toy in"):
        plan.check_for(model="other", num_experts=4, layer_ids=(0,), num_ranks=2)
    with pytest.raises(PlanError, match="num_experts is 4 in the plan, 8 in this model"):
        plan.check_for(model="toy", num_experts=8, layer_ids=(0,), num_ranks=2)
    with pytest.raises(PlanError, match="layer_ids is 0 in the plan, 3 in this model"):
        plan.check_for(model="toy", num_experts=4, layer_ids=(3,), num_ranks=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "exflow.plan/9"}, "format is 'exflow.plan/9'"),
        ({"slots": [[[0, 1], [2, "3"]]]}, "whole numbers, got '3'"),
        ({"slots": None}, "missing or has the wrong type"),
        ({"topology": {"num_nodes": 0, "ranks_per_node": 2}}, "at least one node"),
        ({"model": ...}, "'model'"),
        ({"num_experts": "abc"}, "num_experts must hold whole numbers, got 'abc'"),
        ({"num_experts": float("nan")}, "whole numbers, got nan"),
        ({"num_experts": float("inf")}, "whole numbers, got inf"),
        ({"num_experts": 10**12}, r"no copy of experts \[4, 5, 6"),
        ({"num_experts": 0}, "at least 1, got 0"),
        ({"layer_ids": ["x"]}, "layer_ids must hold whole numbers, got 'x'"),
        ({"topology": {"num_nodes": "two", "ranks_per_node": 2}}, "num_nodes must hold"),
        ({"strategy": {"name": "a", "seed": "x"}}, "seed must hold whole numbers, got 'x'"),
        ({"strategy": {"name": "a", "options": ["ab"]}}, "options must be a JSON object"),
        ({"predicted": 5}, "predicted must be a JSON object, got 5"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path, change, message):
    path = tmp_path / "plan.json"
    make_plan([[[0, 1], [2, 3]]]).save(path)
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    with pytest.raises(PlanError, match=rf"plan\.json: .*{message}"):
        PlacementPlan.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "too deeply nested"),
        ('{"num_experts": ' + "9" * 5000 + "}", "a number has too many digits"),
    ],
)
def test_text_that_is_no_json_is_refused(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=rf"not a usable placement plan: .*{message}"):
        PlacementPlan.load(tmp_path / "plan.json")


def test_a_missing_plan_says_how_to_make_one(tmp_path):
    with pytest.raises(PlanError, match="no such plan; make one with `exflow place"):
        PlacementPlan.load(tmp_path / "other.json")


def test_a_coherence_domain_must_divide_the_ranks():
    topology = Topology(num_nodes=2, ranks_per_node=2)
    assert topology.domain_of_rank(2).tolist() == [0, 0, 1, 1]
    assert topology.domain_of_rank().tolist() == [0, 0, 0, 0]
    with pytest.raises(TopologyError, match=r"3 ranks does not divide 4 ranks; choose .*1, 2, 4"):
        topology.domain_of_rank(3)


@pytest.mark.parametrize(
    "outlook",
    [(((0, 0),),), (((0,),) * 4,), (((0, -1),) * 4,), (((0, 1 << 20),) * 4,)],
)
def test_an_outlook_of_the_wrong_shape_or_size_is_refused(outlook):
    with pytest.raises(PlanError, match="outlook must hold"):
        make_plan([[[0, 1], [2, 3]]], outlook=outlook)
