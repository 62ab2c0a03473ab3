"""Import, export, lint and verify as a user runs them, each in a fresh interpreter."""

import base64
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from placement.trace import RoutingTrace

CONFIG = {
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}


def run(*arguments, code=0):
    result = subprocess.run(
        [sys.executable, "-m", "placement", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def routing(tokens, seed):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, 4, 8)), axis=2)[:, :, :2]
    ids[:, 0] = 0
    return ids


@pytest.fixture
def folder(tmp_path):
    """A model's config, SGLang responses, and a plan with 25% replicas for four ranks."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with (tmp_path / "r.jsonl").open("w") as file:
        for number in range(4):
            ids = routing(20, number).astype("<i4")
            meta = {"id": f"r{number}", "routed_experts": base64.b64encode(ids).decode()}
            file.write(json.dumps({"text": "", "meta_info": meta}) + "\n")
    slots = (((0, 1, 6), (2, 3, 7), (4, 5, 0), (6, 7, 1)),) * 3
    PlacementPlan(
        model="toy",
        num_experts=8,
        layer_ids=(1, 2, 3),
        topology=Topology(num_nodes=2, ranks_per_node=2),
        strategy=Strategy(name="test"),
        slots=slots,
    ).save(tmp_path / "plan.json")
    return tmp_path


def test_from_responses_to_a_verified_sglang_placement(folder):
    trace, config, plan = folder / "t.safetensors", folder / "config.json", folder / "plan.json"
    said = run("import", "--from", "sglang", folder / "r.jsonl", "--config", config, "-o", trace)
    assert "80 tokens of 4 sequences, 3 MoE layers, top-2 of 8 experts" in said.stdout
    assert RoutingTrace.load(trace).layer_ids == (1, 2, 3)

    exported = folder / "sglang.json"
    options = ("--target", "sglang", "--config", config)
    said = run("export", plan, *options, "-o", exported)
    assert "--ep-size 4 --ep-num-redundant-experts 4" in said.stdout
    assert len(json.loads(exported.read_text())["physical_to_logical_map"]) == 4

    assert "0 errors" in run("lint", plan, "--target", "sglang", "--model", config).stdout
    served = ("--served", exported, "--config", config)
    said = run("verify", plan, trace, "--expected", trace, *served)
    assert "the engine serves this plan" in said.stdout

    read = folder / "back.json"
    where = ("--nodes", 2, "--ranks-per-node", 2)
    run("import", "--plan", "--from", "sglang", exported, "--config", config, *where, "-o", read)
    assert PlacementPlan.load(read).slots == PlacementPlan.load(plan).slots


def test_loads_alone_serve_a_plan_but_not_where_affinity_is_asked(folder):
    np.save(folder / "loads.npy", np.random.default_rng(0).random((3, 8)).astype(np.float32))
    loads, trace = folder / "loads.npy", folder / "loads.safetensors"
    said = run("import", "--from", "npy", loads, "-o", trace)
    assert "affinity needs routed experts" in said.stdout
    run("place", trace, "--strategy", "balanced", "-o", folder / "balanced.json")
    said = run("place", trace, "--strategy", "affinity", "-o", folder / "no.json", code=2)
    assert "made from loads alone" in said.stderr


def test_lint_fails_on_a_file_the_engine_would_refuse(folder):
    bad = folder / "bad.json"
    bad.write_text(json.dumps({"physical_to_logical_map": [[0, 1]], "ep_size": 2}))
    said = run("lint", bad, "--target", "sglang", code=1)
    assert "stops on any other" in said.stdout


def test_verify_fails_when_another_placement_is_served_or_traffic_is_off(folder):
    trace, config, plan = folder / "t.safetensors", folder / "config.json", folder / "plan.json"
    run("import", "--from", "sglang", folder / "r.jsonl", "--config", config, "-o", trace)
    loaded = RoutingTrace.load(trace)
    loaded.select(loaded.sequence_ids == 0).save(folder / "one.safetensors")
    other = folder / "other.json"
    run("export", plan, "--target", "sglang", "--config", config, "-o", other)
    swapped = json.loads(other.read_text())
    swapped["physical_to_logical_map"][2].reverse()
    other.write_text(json.dumps(swapped))
    served = ("--served", other, "--config", config)
    said = run("verify", plan, trace, "--expected", trace, *served, "--json", code=1)
    assert json.loads(said.stdout)["served_differences"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "--from", "sglang", "r.jsonl", "-o", "t"), "--num-layers"),
        (("import", "--from", "mlx", "r.jsonl", "-o", "t"), "choose one of vllm"),
        (("import", "--from", "vllm", "none.jsonl", "-o", "t"), "no such file"),
        (("export", "plan.json", "--target", "mlx", "-o", "x"), "unknown target 'mlx'"),
        (("export", "plan.json", "--target", "exflow-csv", "-o", "x"), "the plan has replicas"),
        (("export", "plan.json", "--target", "checkpoint", "-o", "x"), "needs --source"),
    ],
)
def test_mistakes_end_with_one_line_that_says_what_to_do(folder, arguments, message):
    named = [folder / a if a.endswith((".jsonl", ".json")) else a for a in arguments]
    result = run(*named, code=2)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_placed_plan_is_verified_by_its_own_predictions(folder):
    trace, placed = folder / "p.safetensors", folder / "placed.json"
    config = folder / "config.json"
    run("import", "--from", "sglang", folder / "r.jsonl", "--config", config, "-o", trace)
    run("place", trace, "--no-compare", "-o", placed)
    for protocol in ("home", "coherent"):
        said = run("verify", placed, trace, "--protocol", protocol)
        assert "rows/token total" in said.stdout


def test_a_recording_that_foretells_nothing_is_not_held_against_foretold_starts(folder):
    trace, foretold = folder / "p.safetensors", folder / "f.safetensors"
    placed = folder / "placed.json"
    config = folder / "config.json"
    run("import", "--from", "sglang", folder / "r.jsonl", "--config", config, "-o", trace)
    recorded = RoutingTrace.load(trace)
    replace(recorded, foretold_ids=recorded.expert_ids[:, 0]).save(foretold)
    run("place", foretold, "--no-compare", "-o", placed)
    run("verify", placed, foretold, "--protocol", "coherent")
    run("verify", placed, trace, "--protocol", "home")
    said = run("verify", placed, trace, "--protocol", "coherent", code=2)
    assert "give --expected" in said.stderr
    assert len(said.stderr.splitlines()) == 1
    said = run("verify", placed, trace, "--protocol", "coherent", "--expected", foretold)
    assert said.stdout.count("1.000") >= 5, "both are counted from home"


def test_filling_slots_does_not_write_over_the_plan_it_reads(folder):
    plan = folder / "engine.plan.json"
    slots = (((0, 1, 6), (2, 3), (4, 5), (6, 7)),) * 3
    replace(PlacementPlan.load(folder / "plan.json"), slots=slots).save(plan)
    before = plan.read_bytes()
    options = ("--target", "sglang", "--config", folder / "config.json", "--fill")
    said = run("export", plan, *options, "-o", folder / "engine.json", code=2)
    assert "would be overwritten; name another output" in said.stderr
    assert plan.read_bytes() == before
    assert not (folder / "engine.json").exists()
    run("export", plan, *options, "-o", folder / "other.json")
