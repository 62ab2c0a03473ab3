"""`exflow run` as people start it: torchrun and one rank."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_checkpoints import qwen3_moe, save_byte_tokenizer

pytestmark = pytest.mark.distributed

PROMPTS = [{"prompt": "One"}, {"text": "two", "meta": {}}, {"id": "third", "prompt": "and three"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    qwen3_moe(folder, vocab_size=256, num_hidden_layers=2, num_experts_per_tok=1)
    save_byte_tokenizer(folder)
    return folder


def start(launcher, model, folder, *options):
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return subprocess.run(
        [*launcher, "-m", "exflow", "run", str(model), "--prompts", str(folder / "prompts.jsonl"),
         "--max-new-tokens", "5", *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["id"]: line for line in lines}


def test_two_ranks_go_on_where_one_stopped_and_agree_with_it(model, tmp_path):
    alone = start([sys.executable], model, tmp_path, "-o", str(tmp_path / "alone.jsonl"))
    assert (alone.returncode, alone.stdout) == (0, ""), alone.stderr
    expected = read(tmp_path / "alone.jsonl")
    assert set(expected) == {0, 1, "third"}
    assert all(len(line["token_ids"]) == 5 for line in expected.values())

    output, metrics = tmp_path / "pair.jsonl", tmp_path / "metrics.json"
    output.write_text(json.dumps(expected[0]) + "\n")
    pair = start(
        TORCHRUN, model, tmp_path, "-o", str(output), "--metrics", str(metrics),
        "--protocol", "coherent", "--dtype", "float32",
    )  # fmt: skip
    assert pair.returncode == 0, pair.stderr
    assert read(output) == expected
    counts = json.loads(metrics.read_text())
    assert counts["requests"] == {"finished": 2, "refused": 0, "skipped": 1}
    assert counts["measured_equals_predicted"] is True
    decode = counts["phases"]["decode"]
    assert decode["messages"]["dispatch"] == 2 * decode["steps"]
    assert "combine" not in decode["messages"]


def test_a_mistake_is_one_line_and_exit_code_two(model, tmp_path):
    result = start(
        [sys.executable], model, tmp_path,
        "-o", str(tmp_path / "out.jsonl"), "--plan", str(tmp_path / "nowhere.json"),
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "exflow place" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_deepspeed_launcher_starts_ranks_too(model, tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed, of the extra [deepspeed]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output, metrics = tmp_path / "out.jsonl", tmp_path / "metrics.json"
    launcher = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
        "--master_port", str(port), "--module", "exflow",
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    folder = Path(sys.executable).parent
    done = subprocess.run(
        [*launcher, "run", str(model), "--prompts", str(tmp_path / "prompts.jsonl"),
         "--max-new-tokens", "5", "-o", str(output), "--metrics", str(metrics)],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(read(output)) == {0, 1, "third"}
    assert json.loads(metrics.read_text())["world_size"] == 2
