"""The systems that are compared decode what the unsharded model does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PEERS = ["autoep", "transformers_ep", "deepspeed_moe"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs the extra [bench]"
    ),
]


def call(*command):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.parametrize(("top_k", "experts"), [(1, 8), (3, 16)])
def test_every_arm_says_the_unsharded_models_tokens(top_k, experts, tmp_path):
    model, corpus = tmp_path / "planted", tmp_path / "corpus.jsonl"
    sizes = ("--hidden-size", 128, "--num-layers", 2, "--kv-ratio", 0.5, "--expert-size", 32)
    routing = ("--num-experts", experts, "--top-k", top_k)
    call(sys.executable, "scripts/planted_model.py", model, *sizes, *routing)
    line = {"text": "The quick brown fox jumps. " * 20, "meta": {"pile_set_name": "Foxes"}}
    corpus.write_text(json.dumps(line) + "\n")
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "results.json"
    prepare = [sys.executable, "-m", "scripts.peers.prepare", model, corpus, "-o", prompts]
    call(*prepare, "--requests", 8, "--prompt-tokens", 5, "--steps", 4)
    ours = [
        {
            "name": protocol,
            "peer": "exflow_run",
            "options": {"protocol": protocol, "folder": str(tmp_path / protocol)},
        }
        for protocol in ("home", "coherent")
    ]
    job = {
        "checkpoint": str(model),
        "prompts": str(prompts),
        "steps": 4,
        "repeats": 1,
        "results": str(results),
        "arms": ours + [{"name": peer, "peer": peer} for peer in PEERS],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    call(*TORCHRUN, "-m", "scripts.peers.worker", tmp_path / "job.json")
    expected = [json.loads(line)["expected"] for line in prompts.read_text().splitlines()]
    arms = json.loads(results.read_text())
    assert [arm["error"] for arm in arms] == [None] * 5
    assert [arm["name"] for arm in arms if arm["runs"][0]["tokens"] != expected] == []
