"""The commands place, simulate and compare, as users call them."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from placement.plan import PlacementPlan
from placement.trace import RoutingTrace
from placement.traffic import count_traffic
from planted import planted_trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    planted_trace(experts=16, top_k=2, tokens=600).save(path / "trace.safetensors")
    planted_trace(experts=16, top_k=2, tokens=300, seed=5).save(path / "other.safetensors")
    return path


def call(folder, *words):
    command = [sys.executable, "-m", "placement", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def place(folder, output, *words):
    return call(folder, "place", "trace.safetensors", "-o", output, "--effort", "0.2", *words)


def test_place_writes_a_plan_and_ends_with_a_held_out_table(folder):
    done = place(folder, "plan.json", "--time-limit", "5")
    assert done.returncode == 0, done.stderr
    plan = PlacementPlan.load(folder / "plan.json")
    assert plan.bound["rows_per_token"] <= plan.predicted["rows_per_token"]["total"]
    table = done.stdout.split("held-out")[1]
    for name in ("linear, home", "round_robin", "balanced", "exflow_milp", "affinity, coherent"):
        assert name in table
    assert table.strip().splitlines()[-1].startswith("affinity")


def test_place_saves_the_rows_of_a_backend(folder):
    (folder / "links.json").write_text('{"intra_bandwidth": 1e9, "inter_bandwidth": 5e8}')
    machine = ("--nodes", "2", "--ranks-per-node", "2", "--backend", "nccl-ep")
    done = place(folder, "nccl.json", *machine, "--links", "links.json", "--time-limit", "5")
    assert done.returncode == 0, done.stderr
    assert "between nodes) at imbalance" in done.stdout.splitlines()[1]
    table = done.stdout.split("held-out")[1].strip().splitlines()
    assert table[-1].startswith("affinity, home")
    plan = PlacementPlan.load(folder / "nccl.json")
    assert plan.strategy.options["backend"] == "nccl-ep"
    assert plan.strategy.options["intra_node_cost"] == 0.5
    assert plan.predicted["protocol"] == "home"
    rows = plan.predicted["rows_per_token"]
    assert plan.predicted["sent"]["inter"] == rows["inter_node"] > rows["inter_node_dedup"]
    words = ("simulate", "trace.safetensors", "nccl.json", "--backend", "nccl-ep", "--json")
    counted = json.loads(call(folder, *words).stdout)
    assert counted["protocol"] == "home"
    assert counted["plans"][0]["sent"] == plan.predicted["sent"]
    done = place(folder, "none.json", *machine, "--protocol", "coherent")
    assert done.returncode == 2
    assert "nccl-ep brings tokens home" in done.stderr
    done = call(folder, *words, "--protocol", "coherent")
    assert done.returncode == 2
    assert "nccl-ep brings tokens home" in done.stderr
    for words in (("--evaluate",), ("--weights", "fair")):
        done = place(folder, "none.json", *machine, *words)
        assert done.returncode == 2
        assert "count exflow's rows; leave them out with nccl-ep" in done.stderr
    assert not (folder / "none.json").exists()


def test_simulate_prints_one_json_line_that_agrees_with_the_plan(folder):
    assert place(folder, "a.json", "--no-compare").returncode == 0
    assert place(folder, "b.json", "--no-compare", "--strategy", "linear").returncode == 0
    done = call(folder, "simulate", "trace.safetensors", "a.json", "b.json", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["plan"] for row in result["plans"]] == ["a.json", "b.json"]
    rows = [row["rows_per_token"]["total"] for row in result["plans"]]
    assert rows[0] < rows[1]
    predicted = PlacementPlan.load(folder / "a.json").predicted["rows_per_token"]
    assert rows[0] == pytest.approx(predicted["total"])


def test_simulate_says_where_no_gain_is_possible(folder):
    place(folder, "b.json", "--no-compare", "--strategy", "linear")
    done = call(folder, "simulate", "trace.safetensors", "b.json", "--backend", "agrs")
    assert "no gain possible: agrs sends all tokens to all ranks" in done.stdout
    done = call(folder, "simulate", "trace.safetensors", "b.json", "--backend", "deepep-ll")
    assert "no gain possible: deepep-ll sends a row for each expert" in done.stdout
    done = call(folder, "simulate", "trace.safetensors", "b.json", "--backend", "exflow")
    assert "domain 4" in done.stdout


def test_compare_tells_what_a_warm_start_moves(folder):
    place(folder, "b.json", "--no-compare", "--strategy", "linear")
    warm = ("--from", "b.json", "--max-moves", "6", "--no-compare")
    assert place(folder, "c.json", *warm).returncode == 0
    words = ("compare", "b.json", "c.json", "--trace", "trace.safetensors", "--json")
    result = json.loads(call(folder, *words).stdout)
    assert 0 < result["loaded"] <= 6
    rows = [row["rows_per_token"]["total"] for row in result["plans"]]
    assert rows[1] < rows[0]


def test_the_groups_of_a_plan_are_kept_and_shown_beside_the_baselines(folder):
    place(folder, "b.json", "--no-compare", "--strategy", "balanced")
    done = place(folder, "g.json", "--from", "b.json", "--keep-groups")
    assert done.returncode == 0, done.stderr
    assert "affinity" in done.stdout.split("held-out")[1]
    words = ("compare", "b.json", "g.json", "--trace", "trace.safetensors", "--json")
    before, after = json.loads(call(folder, *words).stdout)["plans"]
    assert after["imbalance"] == pytest.approx(before["imbalance"])
    assert after["rows_per_token"]["total"] < before["rows_per_token"]["total"]


@pytest.mark.parametrize("weights", ["3,1", "even", "fair"])
def test_several_traces_are_weighed(folder, weights):
    words = ("place", "trace.safetensors", "other.safetensors", "-o", "w.json")
    done = call(folder, *words, "--weights", weights, "--effort", "0.2", "--no-compare")
    assert done.returncode == 0, done.stderr


def test_place_warns_of_a_plan_above_the_cap(folder):
    linear = ("--no-compare", "--strategy", "linear")
    done = place(folder, "b.json", *linear, "--max-imbalance", "1.0001")
    assert done.returncode == 0
    assert "above --max-imbalance 1.0001; only --strategy affinity heeds it" in done.stderr
    assert place(folder, "b.json", *linear, "--max-imbalance", "9").stderr == ""


def test_place_refuses_an_output_that_cannot_be_written_before_it_reads_the_trace(folder):
    (folder / "results").mkdir()
    done = call(folder, "place", "no-such-trace", "-o", "results")
    assert done.returncode == 2
    assert done.stderr == "error: results: cannot be written, it is a folder; name a file\n"
    done = call(folder, "place", "no-such-trace", "-o", "trace.safetensors/plan.json")
    assert done.returncode == 2
    assert "trace.safetensors/plan.json: cannot be written" in done.stderr
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "none", "-o", "folder", "--overwrite"),
        ("import", "none", "--from", "vllm", "-o", "folder"),
        ("export", "b.json", "--target", "exflow-csv", "-o", "folder"),
    ],
)
def test_other_outputs_are_refused_before_the_work_too(folder, words):
    place(folder, "b.json", "--no-compare", "--strategy", "linear")
    (folder / "folder").mkdir(exist_ok=True)
    done = call(folder, *words)
    assert done.returncode == 2
    assert done.stderr == "error: folder: cannot be written, it is a folder; name a file\n"


def test_a_plan_of_loads_alone_predicts_its_load_and_no_rows(folder):
    trace = RoutingTrace.load(folder / "trace.safetensors")
    replace(trace, phase="counts").save(folder / "counts.safetensors")
    done = call(folder, "place", "counts.safetensors", "-o", "l.json", "--strategy", "balanced")
    assert done.returncode == 0, done.stderr
    assert "no rows are counted" in done.stdout
    plan = PlacementPlan.load(folder / "l.json")
    assert plan.predicted["imbalance"] == count_traffic(trace, plan).imbalance()
    assert "rows_per_token" not in plan.predicted
    for words in (
        ("simulate", "counts.safetensors", "l.json"),
        ("simulate", "counts.safetensors", "l.json", "--backend", "agrs"),
        ("compare", "l.json", "l.json", "--trace", "counts.safetensors"),
    ):
        done = call(folder, *words)
        assert done.returncode == 2
        assert "made from loads alone" in done.stderr


def test_simulate_verify_and_compare_refuse_another_model(folder):
    place(folder, "b.json", "--no-compare", "--strategy", "linear")
    plan = PlacementPlan.load(folder / "b.json")
    replace(plan, model="else").save(folder / "else.json")
    for words in (
        ("simulate", "trace.safetensors", "else.json"),
        ("verify", "else.json", "trace.safetensors", "--expected", "trace.safetensors"),
    ):
        done = call(folder, *words)
        assert done.returncode == 2
        assert "model is planted in the trace, else in the plan" in done.stderr
    done = call(folder, "compare", "b.json", "else.json")
    assert done.returncode == 2
    assert "model is planted in the old plan, else in the new one" in done.stderr


def test_verify_refuses_predictions_that_are_no_numbers(folder):
    place(folder, "b.json", "--no-compare", "--strategy", "linear")
    plan = PlacementPlan.load(folder / "b.json")
    for predicted in ({"home": 5}, {"home": {"imbalance": {"max": "x"}}}):
        replace(plan, predicted=predicted).save(folder / "p.json")
        done = call(folder, "verify", "p.json", "trace.safetensors")
        assert done.returncode == 2
        assert "predicted figures have the wrong type" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "trace.safetensors", "b.json", "--hidden-size", "-3"),
        ("simulate", "trace.safetensors", "b.json", "--kv-elements", "-1"),
        ("simulate", "trace.safetensors", "b.json", "--element-bytes", "0"),
        ("simulate", "trace.safetensors", "b.json", "--tokens-per-rank", "0"),
        ("compare", "b.json", "b.json", "--expert-bytes", "-5"),
        ("import", "none", "--from", "npy", "-o", "x", "--num-experts", "0"),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_option_named(folder, words):
    done = call(folder, *words)
    assert done.returncode == 2
    assert f"Invalid value for '{words[-2]}'" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slots-per-rank", "3"), "--slots-per-rank 4 or more"),
        (("--max-imbalance", "0.5"), "at least 1"),
        (("--max-imbalance", "1.0"), "allow a higher --max-imbalance"),
        (("--strategy", "best"), "unknown strategy"),
        (("--coherence-domain", "3"), "does not divide"),
        (("--weights", "1,2"), "for each of 1 traces"),
        (("--from", "missing.json"), "no such plan"),
        (("--max-moves", "3"), "--from"),
        (("--seed", "-1"), "seed must be a whole number from 0"),
        (("--time-limit", "-1"), "time_limit is in seconds, above 0"),
        (("--effort", "inf"), "effort must be a number above 0"),
        (("--effort", "1e30"), "at most 10000"),
        (("--keep-groups",), "--from"),
        (("--keep-groups", "--strategy", "balanced"), "for --strategy affinity"),
        (("--max-moves", "0", "--strategy", "linear"), "--max-moves: only for --strategy affinity"),
        (("--spread", "--weights", "1", "--strategy", "linear"), "--spread, --weights: only for"),
        (("--keep-groups", "--evaluate"), "--evaluate fits plans afresh"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(folder, words, message):
    done = place(folder, "bad.json", "--no-compare", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "bad.json").exists()


def test_what_cannot_be_evaluated_is_refused_before_a_plan_is_written(tmp_path):
    planted_trace(tokens=60, sequences=1).save(tmp_path / "trace.safetensors")
    done = place(tmp_path, "plan.json", "--evaluate")
    assert done.returncode == 2
    assert "half of the sequences, the trace has one; leave it out" in done.stderr
    assert not (tmp_path / "plan.json").exists()
