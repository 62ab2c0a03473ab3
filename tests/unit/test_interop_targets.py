"""Export targets: round trips, what they refuse, what they say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.commands.lint import lint
from placement.interop.errors import ConfigError, ExportError
from placement.interop.model_shape import ModelShape, parse_layers
from placement.interop.slots import fill_slots
from placement.interop.targets import TARGETS, export_text, find_target, read_export
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology

EQUAL_SLOTS = ("sglang", "trtllm", "vllm", "vllm-41141", "vllm-ascend")


def make_plan(slots, layer_ids=None, nodes=1, **fields):
    slots = tuple(tuple(tuple(experts) for experts in ranks) for ranks in slots)
    return PlacementPlan(
        model="toy",
        num_experts=fields.pop("num_experts", 4),
        layer_ids=tuple(layer_ids or range(len(slots))),
        topology=Topology(num_nodes=nodes, ranks_per_node=len(slots[0]) // nodes),
        strategy=Strategy(name="test"),
        slots=slots,
    )


@st.composite
def plans(draw, *, replicas=True, equal=True):
    """Random plans; layer ids may start late and have gaps, as with dense layers."""
    ranks, share = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    gaps = draw(st.lists(st.integers(0, 2), min_size=layers, max_size=layers))
    layer_ids = np.cumsum(np.array(gaps) + 1) - 1
    experts = ranks * share if not replicas else draw(st.integers(share, ranks * share))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    slots = [_random_layer(rng, ranks, share, experts) for _ in range(layers)]
    if not equal:
        slots = [[[*on, *([e] if (e := 0) not in on else [])] for on in layer] for layer in slots]
    return make_plan(slots, [int(x) for x in layer_ids], num_experts=experts)


def _random_layer(rng, ranks, share, experts):
    """Every expert somewhere, none twice on a rank, `share` on each."""
    order = [int(e) for e in rng.permutation(experts)]
    layer = [order[r::ranks] for r in range(ranks)]
    for on in layer:
        spare = [e for e in order if e not in on]
        on += spare[: share - len(on)]
    return layer


def shape_of(plan, extra_layers=0):
    return replace(ModelShape.of_plan(plan), num_layers=max(plan.layer_ids) + 1 + extra_layers)


@pytest.mark.parametrize("name", EQUAL_SLOTS)
@settings(max_examples=40)
@given(plan=plans(), extra_layers=st.integers(0, 2))
def test_an_exported_plan_read_back_has_the_same_slots(name, plan, extra_layers):
    target, shape = find_target(name), shape_of(plan, extra_layers)
    read = target.parse(export_text(plan, target, shape), shape, plan.num_ranks)
    assert (read.slots, read.layer_ids, read.num_experts) == (
        plan.slots,
        plan.layer_ids,
        plan.num_experts,
    )


@settings(max_examples=40)
@given(plan=plans(equal=False))
def test_deepspeed_descriptors_carry_replicas_and_unequal_ranks_both_ways(plan):
    target, shape = find_target("deepspeed"), shape_of(plan)
    read = target.parse(export_text(plan, target, shape), shape, plan.num_ranks)
    assert (read.slots, read.layer_ids) == (plan.slots, plan.layer_ids)


@settings(max_examples=40)
@given(plan=plans(replicas=False))
def test_the_papers_csv_carries_plans_without_replicas_both_ways(plan):
    target, shape = find_target("exflow-csv"), shape_of(plan)
    read = target.parse(export_text(plan, target, shape), shape, plan.num_ranks)
    assert np.array_equal(read.to_plan(plan.topology, model="toy", source="").hosts(), plan.hosts())


@settings(max_examples=40)
@given(plan=plans(replicas=False), layers=st.integers(1, 3))
def test_the_rank_list_of_vllm_34811_carries_any_map_of_all_layers_both_ways(plan, layers):
    plan = make_plan([plan.slots[0]] * layers, num_experts=plan.num_experts)
    target, shape = find_target("vllm-34811"), shape_of(plan)
    read = target.parse(export_text(plan, target, shape), shape, plan.num_ranks)
    assert np.array_equal(read.to_plan(plan.topology, model="toy", source="").hosts(), plan.hosts())


def test_the_rank_list_of_vllm_34811_carries_a_plan_that_is_the_same_in_all_layers():
    plan = make_plan([[[0, 2], [1, 3]], [[2, 0], [3, 1]]])
    target, shape = find_target("vllm-34811"), shape_of(plan)
    text = export_text(plan, target, shape)
    assert json.loads(text) == {"expert_to_ep_rank": [0, 1, 0, 1]}
    assert target.parse(text, shape, 2).slots == (((0, 2), (1, 3)),) * 2


def test_vllm_34811_refuses_a_plan_whose_layers_differ():
    plan = make_plan([[[0, 2], [1, 3]], [[0, 1], [2, 3]]])
    with pytest.raises(ExportError, match="one map for all layers"):
        export_text(plan, find_target("vllm-34811"), shape_of(plan))


@pytest.mark.parametrize("name", EQUAL_SLOTS)
def test_ranks_with_different_slots_are_refused_with_the_rank_and_what_to_do(name):
    plan = make_plan([[[0, 1], [2, 3]], [[0, 1, 2], [3]]], [2, 5])
    with pytest.raises(ExportError, match=r"rank 0 holds 3 .* layer 5.*--slots-per-rank"):
        export_text(plan, find_target(name), shape_of(plan))


def test_unused_slots_are_filled_with_what_a_node_lacks_and_nothing_is_taken_away():
    plan = make_plan([[[0, 1], [2], [3], [0, 1]], [[0, 1], [2, 3], [0, 1], [2, 3]]], nodes=2)
    filled = fill_slots(plan)
    assert filled.slots[0] == ((0, 1), (2, 3), (3, 2), (0, 1))
    assert filled.slots[1] == plan.slots[1]
    assert fill_slots(filled) == filled


def test_the_papers_csv_refuses_replicas():
    plan = make_plan([[[0, 1, 2], [2, 3, 0]]])
    with pytest.raises(ExportError, match="replicas"):
        export_text(plan, find_target("exflow-csv"), shape_of(plan))


def test_sglang_gets_one_key_and_a_row_for_every_decoder_layer_dense_ones_too():
    plan = make_plan([[[1, 0, 2], [3, 2, 0]]], [1])
    shape = ModelShape(num_layers=3, moe_layers=(1,), num_experts=4)
    data = json.loads(export_text(plan, find_target("sglang"), shape))
    assert data == {
        "physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [1, 0, 2, 3, 2, 0], [0, 1, 2, 3, 0, 1]]
    }


def test_a_file_with_another_key_is_refused_as_sglang_would():
    text = json.dumps({"physical_to_logical_map": [[0, 1]], "model": "toy"})
    with pytest.raises(ExportError, match="stops on any other"):
        find_target("sglang").parse(text, ModelShape(), 1)


def test_rows_for_moe_layers_only_are_refused_for_sglang():
    text = json.dumps({"physical_to_logical_map": [[0, 1]]})
    with pytest.raises(ExportError, match="dense ones too"):
        find_target("sglang").parse(text, ModelShape(num_layers=2, moe_layers=(1,)), 1)


def test_tensorrt_yaml_has_integer_layers_and_the_default_row_for_the_mtp_layer():
    plan = make_plan([[[1, 3], [0, 2]]], [3])
    shape = ModelShape(num_layers=4, moe_layers=(3,), num_experts=4, num_mtp_layers=1)
    data = yaml.safe_load(export_text(plan, find_target("trtllm"), shape))
    assert data == {
        "num_slots": 4,
        "initial_global_assignments": {3: [1, 3, 0, 2], 4: [0, 1, 2, 3]},
        "layer_updates_per_iter": 0,
    }


def test_tensorrt_refuses_an_extra_key_and_a_missing_layer():
    parse = find_target("trtllm").parse
    text = "num_slots: 2\nep_size: 1\ninitial_global_assignments:\n  0: [0, 1]\n"
    with pytest.raises(ExportError, match="no other"):
        parse(text, ModelShape(), 1)
    text = "num_slots: 2\ninitial_global_assignments:\n  0: [0, 1]\nlayer_updates_per_iter: 0\n"
    with pytest.raises(ExportError, match="layers \\[1\\] are missing"):
        parse(text, ModelShape(moe_layers=(0, 1)), 1)


def test_vllm_41141_passes_over_other_records_and_checks_the_counts():
    plan = make_plan([[[0, 1, 2], [3, 0, 1]]])
    target, shape = find_target("vllm-41141"), shape_of(plan)
    record = export_text(plan, target, shape)
    both = json.dumps({"record_type": "session_metadata"}) + "\n" + record
    assert target.parse(both, shape, 2).slots == plan.slots
    wrong = record.replace('"num_redundant_experts": 2', '"num_redundant_experts": 3')
    with pytest.raises(ExportError, match="must be 6 and 2"):
        target.parse(wrong, shape, 2)


def test_a_plan_for_another_model_is_refused_by_every_target():
    plan = make_plan([[[0, 2], [1, 3]]], [1])
    for name in TARGETS:
        with pytest.raises(ExportError, match="the model's MoE layers are 0"):
            export_text(plan, find_target(name), ModelShape(num_layers=1, moe_layers=(0,)))


def test_groups_spread_over_nodes_are_warned_about():
    plan = make_plan([[[0, 2], [1, 3]]], nodes=2)
    shape = ModelShape(num_layers=1, moe_layers=(0,), num_experts=4, num_groups=2, top_groups=1)
    texts = [finding.text for finding in find_target("sglang").check(plan, shape)]
    assert any("2 groups" in text and "spread over nodes" in text for text in texts)


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(ExportError, match=r"sglang.*checkpoint"):
        find_target("mlx")


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_local_experts": 8}, (0, 1, 2, 3)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1}, (1, 2, 3)),
        ({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ({"num_experts": 8, "mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, (1, 2)),
        ({"num_experts": 8, "moe_layer_freq": [0, 1, 0, 1]}, (1, 3)),
        ({"text_config": {"num_experts": 8, "num_hidden_layers": 2}}, (0, 1)),
    ],
)
def test_moe_layers_are_read_from_config_in_the_words_of_each_family(tmp_path, config, layers):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"num_hidden_layers": 4} | config))
    shape = ModelShape.from_config(tmp_path)
    assert (shape.moe_layers, shape.num_experts) == (layers, 8)


def test_a_dense_models_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match="no routed experts"):
        ModelShape.from_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "3,2", "1,1", "-3", "5-3", "\u00b2", "0-9999999999"]
)
def test_layer_lists_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError):
        parse_layers(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"num_hidden_layers": ' + "9" * 5000 + "}",
        '{"num_hidden_layers": "two", "num_experts": 4}',
        '{"num_hidden_layers": Infinity, "num_experts": 4}',
        '{"num_hidden_layers": 2, "num_experts": [4]}',
        '{"num_hidden_layers": 2, "num_experts": 4.5}',
        '{"num_hidden_layers": 2, "num_experts": -4}',
        '{"num_hidden_layers": 0, "num_experts": 4}',
        '{"num_hidden_layers": 100000000, "num_experts": 4}',
        '{"num_hidden_layers": 2, "num_experts": 4, "first_k_dense_replace": 2}',
        '{"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 5}',
        '{"num_hidden_layers": 2, "num_experts": 4, "n_group": 3}',
    ],
)
def test_a_config_that_cannot_be_or_cannot_be_read_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: .*"):
        ModelShape.from_config(tmp_path)


@pytest.mark.parametrize("name", ["sglang", "vllm", "vllm-41141", "vllm-ascend", "deepspeed"])
@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000])
def test_json_that_cannot_be_read_is_refused_by_every_target(name, text):
    with pytest.raises(ExportError, match="not JSON that can be read"):
        find_target(name).parse(text, ModelShape(), 4)


@pytest.mark.parametrize("row", ["[1,,2]", f"[{'9' * 5000}]"])
def test_a_row_that_trtllm_cannot_read_is_refused_with_its_line(row):
    text = f"num_slots: 2\ninitial_global_assignments:\n  0: {row}\n"
    with pytest.raises(ExportError, match="line 3 is not"):
        find_target("trtllm").parse(text, ModelShape(), 2)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 0, 0, 0], [1, 0, 3, 2]], "rank 0 lists an expert twice"),
        ([[0, 1, 2, 1], [1, 0, 3, 2]], "no copy of experts [3]"),
        ([[0, 1, 2, 3], [0, 1, 2, 9]], "unknown experts [9] of 4"),
        ([[0, 1, 2, 3]], "1 rows, the model has 2"),
    ],
)
def test_lint_says_which_experts_a_map_misses_repeats_or_overruns(tmp_path, capsys, rows, said):
    file, model = tmp_path / "map.json", tmp_path / "config.json"
    file.write_text(json.dumps(rows))
    model.write_text('{"num_hidden_layers": 2, "num_experts": 4}')
    with pytest.raises(typer.Exit):
        lint(file, target="vllm", model=model, ranks=2)
    assert said in capsys.readouterr().out


def ascend(*devices, count=1):
    layer = {"layer_id": 0, "device_count": 1, "device_list": list(devices)}
    return {"moe_layer_count": count, "layer_list": [layer]}


def deepspeed(ranks, num_experts=2, layer="0"):
    entry = {"version": 1, "ep_size": 1, "num_experts": num_experts, "ranks": ranks}
    return {"expert_placement": {layer: entry}}


MALFORMED = {
    "sglang": [{"physical_to_logical_map": [[]]}, {"physical_to_logical_map": [[True]]}],
    "vllm": [None, [[]], [[0.5]], [[0, 1], [1]]],
    "vllm-41141": [
        {"record_type": "eplb_initial_mapping", "version": 1, "initial_global_assignments": given}
        for given in (None, [], 5, "x", {"0": 5}, {"1": [0]}, [1])
    ],
    "vllm-34811": [{"expert_to_ep_rank": given} for given in (None, [], [9], ["a"])],
    "vllm-ascend": [
        {"moe_layer_count": 1, "layer_list": 5},
        {"moe_layer_count": 1, "layer_list": [5]},
        ascend({"device_id": 0, "device_expert": [0]}, count=2),
        ascend({"device_id": 0, "device_expert": []}),
        ascend({"device_id": 0, "device_expert": 5}),
        ascend({"device_id": "x", "device_expert": [0]}),
        ascend({"device_id": float("inf"), "device_expert": [0]}),
        ascend({"device_id": 0, "device_expert": [0]}, {"device_id": 0, "device_expert": [0]}),
    ],
    "deepspeed": [
        *({"expert_placement": given} for given in (None, [], {}, {"x": 1}, {"0": 5}, {"0": {}})),
        deepspeed(5),
        deepspeed([]),
        deepspeed([{"rank": 0, "experts": 5}]),
        deepspeed([{"rank": 0, "experts": [float("inf"), 1]}]),
        deepspeed([{"rank": 0, "experts": [0, 1]}], num_experts=float("inf")),
        deepspeed([{"rank": 0, "experts": [0, 1]}], num_experts=[2]),
        deepspeed([{"rank": 0, "experts": [0, 1]}], layer="-5"),
    ],
    "exflow-csv": [
        "",
        "a",
        "Expert,Node\n0\n",
        f"Expert,Node\n0,{10**30}\n",
        '0,"' + "a" * 200_000,
    ],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in MALFORMED for content in MALFORMED[name]]
)
def test_a_malformed_file_is_refused_in_a_line(tmp_path, name, content):
    file = tmp_path / "file"
    file.write_text(content if name == "exflow-csv" else json.dumps(content))
    with pytest.raises(ExportError, match=r"file: |not a usable") as refused:
        read_export(name, file, ModelShape(moe_layers=(0,), num_experts=2), 1).to_plan(
            Topology(num_nodes=1, ranks_per_node=1), model="", source=name
        )
    assert "\n" not in str(refused.value)


def test_a_file_of_another_model_is_refused(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(json.dumps(deepspeed([{"rank": 0, "experts": [0, 1]}])))
    for shape, said in (
        (ModelShape(num_experts=4), "2 experts a layer, the model has 4"),
        (ModelShape(moe_layers=(3,)), "layers 0, the model's MoE layers are 3"),
    ):
        with pytest.raises(ExportError, match=said):
            read_export("deepspeed", file, shape, 1)


def test_a_plan_of_fewer_experts_than_the_models_groups_is_of_another_model():
    plan = make_plan([[[0, 2], [1, 3]]], nodes=2)
    shape = ModelShape(num_layers=1, moe_layers=(0,), num_experts=16, num_groups=8)
    said = [finding.text for finding in find_target("sglang").check(plan, shape)]
    assert said == ["the plan has 4 experts, the model 16"]
