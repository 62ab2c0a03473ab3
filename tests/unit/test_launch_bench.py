"""The cluster benchmark: what it counts, whom it fails, and the model it plants."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.peers.exflow_run import bytes_between, rows_between
from scripts.peers.hf_decode import greedy
from scripts.peers.summary import ms_by_part, summarise, table
from scripts.planted_model import Shape, write_model

SMALL = Shape(
    hidden_size=128,
    num_layers=3,
    num_experts=8,
    top_k=1,
    expert_size=32,
    kv_ratio=0.5,
    clusters=4,
    strength=3.0,
)


def test_bytes_between_units_are_those_of_rows_between_them_and_a_share_of_what_all_get():
    dispatch = np.zeros((1, 4, 4), dtype=int)
    dispatch[0, 0, 1], dispatch[0, 0, 2] = 3, 1  # ranks 0 and 1 are one node
    combine = np.zeros((1, 4, 4), dtype=int)
    combine[0, 2, 0] = 1
    phase = {
        "rows": {"dispatch": dispatch.tolist(), "combine": combine.tolist()},
        "bytes": {"payload": 5 * 100, "metadata": 4 * 8, "counts": 30, "tokens": 3, "kv_share": 60},
    }
    metrics = {
        "phases": {"decode": phase},
        "world_size": 4,
        "coherence_domain": 4,
        "prefill_dispatch": "flat",
    }
    rows, shared = 2 * 100 + 1 * 8, (30 + 3) * 2 / 3
    assert rows_between(phase, 4, 2) == 2
    assert bytes_between(metrics, 2) == rows + shared + 60 * 2 / 3
    assert (
        bytes_between(metrics | {"prefill_dispatch": "hierarchical"}, 2) == rows + shared + 60 / 3
    )
    assert bytes_between(metrics | {"coherence_domain": 2}, 2) == rows + shared
    assert bytes_between(metrics, 4) == 0


def test_time_is_split_into_what_waits_for_others_and_the_rest():
    seconds = {"dispatch": 0.2, "combine": 0.1, "share": 0.05, "gate": 0.03, "experts": 0.07}
    parts = ms_by_part(seconds, 10)
    assert parts == pytest.approx({"dispatch": 20, "combine": 10, "share": 5, "compute": 10})


def arm(name, rate, tokens, error=None):
    run = {"tokens": tokens, "tokens_per_second": rate, "ms": 1.0}
    sent = {"sent_bytes": 10.0, "trunk_bytes": 0.0}
    return {"name": name, "error": error, "per_token": sent, "runs": [] if error else [run] * 3}


def test_an_arm_that_fails_or_says_other_tokens_is_marked_and_not_compared():
    expected = [[1, 2], [3, 4]]
    arms = [
        arm("coherent/affinity", 300.0, expected),
        arm("home/linear", 100.0, expected),
        arm("autoep", 10.0, [[1, 2], [3, 5]]),
        arm("deepspeed_moe", 10.0, expected, error="TypeError: no"),
    ]
    result = summarise(arms, expected)
    assert result["speedup"] == {"home_linear": 3.0, "autoep": None, "deepspeed_moe": None}
    assert result["arms"]["home/linear"]["failed"] is None
    assert "differ from the unsharded" in result["arms"]["autoep"]["failed"]
    assert result["arms"]["deepspeed_moe"]["failed"] == "TypeError: no"


def test_the_table_has_a_line_an_arm_and_says_what_auto_ran():
    expected = [[1, 2]]
    arms = [arm(name, 100.0, expected) for name in ("coherent/affinity", "autoep")]
    ours = arm("auto/affinity", 100.0, expected)
    counts = {"own_bytes_per_token": 8.0, "rows_per_token": 1.0, "rows_between": 1, "num_tokens": 1}
    known = {
        "ran": "home, domain 1",
        "dispatch": "flat",
        "measured_equals_predicted": True,
        "ms_by_part": {},
    }
    ours["runs"] = [run | counts | known for run in ours["runs"]]
    lines = table("a model", summarise([*arms, ours], expected)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "coherent/affinity",
        "autoep",
        "auto/affinity",
    ]
    assert lines[-1].endswith("home, domain 1")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "model"
    write_model(folder, SMALL)
    return folder


def test_tokens_of_a_cluster_prefer_its_experts_at_every_layer(planted):
    model = AutoModelForCausalLM.from_pretrained(planted).eval()
    with torch.no_grad():
        logits = model(torch.arange(256)[:, None], output_router_logits=True).router_logits
    cluster = torch.arange(256) % SMALL.clusters
    for layer_logits in logits:
        chosen = layer_logits.argmax(dim=1)
        # Experts a cluster uses for most of its tokens: two of eight; by chance a quarter.
        counts = torch.zeros(SMALL.clusters, SMALL.num_experts)
        counts.index_put_((cluster, chosen), torch.ones(256), accumulate=True)
        assert counts.topk(2, dim=1).values.sum() > 0.7 * 256


def test_greedy_tokens_of_the_planted_model_depend_on_its_experts(planted):
    model = AutoModelForCausalLM.from_pretrained(planted).eval()
    prompts = torch.randint(256, (16, 4), generator=torch.Generator().manual_seed(0))
    with_experts, _ = greedy(model, prompts, 8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
    without, _ = greedy(model, prompts, 8)
    assert (with_experts != without).float().mean() > 0.2
    assert len(with_experts.unique()) > 30


def test_the_planted_model_says_that_it_is_planted(planted):
    assert "planted affinity" in json.loads((planted / "planted.json").read_text())["planted"]


def test_a_ratio_of_keys_and_values_that_heads_cannot_have_is_refused():
    assert replace(SMALL, kv_ratio=1.0).num_kv_heads == 2
    with pytest.raises(SystemExit, match=r"kv_ratio must be 0\.5 times"):
        replace(SMALL, kv_ratio=0.3)
