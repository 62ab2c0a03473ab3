"""All arms of a benchmark in one process group, their repeats interleaved.

    torchrun ... -m scripts.peers.worker JOB.json

The job names a model's checkpoint, prompts, steps, repeats and arms; results go to its `results`.
Every arm first makes one token of each prompt, then all of them: this warms it up, and the
difference is what decode sends.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from scripts.peers.interface import Prompts, failing_alike, measure

if TYPE_CHECKING:
    from scripts.peers.interface import Decode

SENT = ("sent_bytes", "trunk_bytes")


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    prompts = Prompts.load(Path(job["prompts"]))
    arms = [open_arm(arm, job, prompts) for arm in job["arms"]]
    for repeat in range(job["repeats"]):
        for arm, decode in arms:
            if arm["error"] is None:
                run_arm(arm, decode, prompts, job["steps"])
                say(f"repeat {repeat + 1}, {arm['name']}: {arm['error'] or arm['runs'][-1]['ms']}")
    if dist.get_rank() == 0:
        results = [arm for arm, _ in arms]
        Path(job["results"]).write_text(json.dumps(results) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def open_arm(
    arm: dict[str, Any], job: dict[str, Any], prompts: Prompts
) -> tuple[dict[str, Any], Decode]:
    """Load an arm's system and count the bytes it sends for a token."""

    def load() -> tuple[Decode, dict[str, float]]:
        peer = import_module(f"scripts.peers.{arm['peer']}")
        given = Path(job["checkpoint"]), arm.get("options", {})
        decode: Decode = peer.load(*given)
        quiet = peer.load_quiet(*given) if hasattr(peer, "load_quiet") else decode
        first, whole = (measure(quiet, prompts, steps) for steps in (1, job["steps"]))
        tokens = len(prompts.token_ids) * (job["steps"] - 1)
        return decode, {key: (whole[key] - first[key]) / tokens for key in SENT}

    opened, error = failing_alike(load)
    say(f"{arm['name']}: {error or 'loaded'}")
    decode, sent = opened or (None, None)
    return {"name": arm["name"], "error": error, "per_token": sent, "runs": []}, decode


def run_arm(arm: dict[str, Any], decode: Decode, prompts: Prompts, steps: int) -> None:
    """One repeat."""
    result, arm["error"] = failing_alike(lambda: measure(decode, prompts, steps))
    if result is None:
        return
    tokens = sum(len(ids) - 1 for ids in result["tokens"])
    result["ms"] = round(1000 * result["decode_seconds"] / (steps - 1), 2)
    result["tokens_per_second"] = tokens / result["decode_seconds"]
    if "own_bytes" in result:
        result["num_tokens"] = tokens
        result["own_bytes_per_token"] = result["own_bytes"] / tokens
    arm["runs"].append(result)


def say(text: str) -> None:
    """Progress, from rank 0."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
