"""`exflow bench` on two ranks: all arms decode the same tokens, and rows are those of the plan."""

import json
import os
from dataclasses import replace

import pytest

from exflow.bench import Bench, BenchError, format_table, run_bench
from exflow.runtime.model import ModelOptions
from harness import run_ranks
from tiny_checkpoints import qwen3_moe, save_byte_tokenizer

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    qwen3_moe(folder / "tiny", vocab_size=256, num_hidden_layers=2)
    save_byte_tokenizer(folder / "tiny")
    prompts = [{"prompt": "x" * (1 + n)} for n in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    plan = {
        "format": "exflow.plan/1",
        "model": "tiny",
        "num_experts": 8,
        "layer_ids": [0, 1],
        "topology": {"num_nodes": 1, "ranks_per_node": 2},
        "strategy": {"name": "test"},
        "slots": [[[0, 2, 4, 6], [1, 3, 5, 7]]] * 2,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    model = ModelOptions(model=str(folder / "tiny"), plan=folder / "plan.json")
    return Bench(model=model, prompts=folder / "prompts.jsonl", new_tokens=4, repeats=2)


def test_all_arms_are_measured_alike_on_every_rank(bench):
    first, second = run_ranks(2, run_bench, bench)
    assert first == second
    assert list(first["arms"]) == ["home/linear", "coherent/linear", "home/plan", "coherent/plan"]
    assert first["tokens_identical"]
    assert (first["ranks"], first["requests"]) == (2, 5)
    for row in first["arms"].values():
        assert row["tokens_per_second"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert row["rows_per_token"] > 0
    assert first["arms"]["home/linear"]["rows_per_token"] >= 2  # one expert elsewhere, most often
    assert "coherent/plan" in format_table(first)


def run_own(benches):
    try:
        run_bench(benches[int(os.environ["RANK"])])
    except ValueError as error:
        return str(error)
    return ""


def test_a_plan_on_one_rank_only_is_noticed(bench):
    """Experts in order, as without a plan."""
    without = replace(bench, model=replace(bench.model, plan=None))
    for told in run_ranks(2, run_own, [bench, without]):
        assert "rank 1 was not given the same plan/" in told


def test_prompts_that_are_all_refused_measure_nothing(bench, tmp_path):
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"prompt": "x" * 1000}) + "\n")
    with pytest.raises(
        BenchError, match="every prompt was refused, the first: the prompt has 1000"
    ):
        run_bench(replace(bench, prompts=prompts, model=replace(bench.model, plan=None)))


def test_a_measurement_without_decode_steps_is_refused(bench):
    with pytest.raises(BenchError, match="--batch-size must be at least 1"):
        replace(bench, batch_size=0)
    with pytest.raises(BenchError, match="--new-tokens must be at least 2"):
        Bench(model=bench.model, prompts=bench.prompts, new_tokens=1)
