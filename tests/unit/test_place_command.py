"""The commands place, simulate and compare, as users call them."""

import json
import subprocess
import sys

import pytest

from placement.plan import PlacementPlan
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
        (("--keep-groups",), "--from"),
        (("--keep-groups", "--strategy", "balanced"), "for --strategy affinity"),
        (("--keep-groups", "--evaluate"), "--evaluate fits plans afresh"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(folder, words, message):
    done = place(folder, "bad.json", "--no-compare", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "bad.json").exists()
