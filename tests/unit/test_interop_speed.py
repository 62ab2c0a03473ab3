"""A long recording is imported in bounded time and memory."""

import base64
import io
import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from placement.trace import RoutingTrace

TOKENS, REQUESTS, LAYERS, TOP_K, EXPERTS = 1_000_000, 500, 24, 4, 32


def write_record(path):
    """Requests of 2000 tokens as vLLM answers them; the model is shaped like gpt-oss-20b."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((TOKENS // REQUESTS, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K]
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.uint8))
    choice = {"index": 0, "routed_experts": base64.b64encode(buffer.getvalue()).decode()}
    with path.open("w") as file:
        for number in range(REQUESTS):
            file.write(json.dumps({"id": f"cmpl-{number}", "model": "toy", "choices": [choice]}))
            file.write("\n")


@pytest.mark.slow
def test_a_vllm_record_of_a_million_tokens_is_imported_within_a_minute_and_two_gigabytes(tmp_path):
    write_record(tmp_path / "r.jsonl")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["-m", "placement", "import", "--from", "vllm", tmp_path / "r.jsonl"]
    options = ["--num-experts", str(EXPERTS), "-o", tmp_path / "t.safetensors"]
    subprocess.run([sys.executable, *command, *options], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 60  # of the processor: the machine may be busy
    assert after.ru_maxrss < 2 * 1024**2
    assert RoutingTrace.load(tmp_path / "t.safetensors").num_tokens == TOKENS
