"""What every system that is compared does: load a checkpoint, decode prompts greedily on all ranks.

Each peer is a file with `load(checkpoint, options) -> Decode`, and can be started alone:

    torchrun --nproc-per-node 4 -m scripts.peers.autoep CHECKPOINT --prompts prompts.jsonl --steps 16

Prompts are token ids of one length. The last line of rank 0's stdout is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

COUNTERS = Path("/sys/class/net/eth0/statistics")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one length.

    Attributes:
        path: JSON Lines with id, prompt and token_ids.
        token_ids: (prompts, length) nested lists.
    """

    path: Path
    token_ids: list[list[int]]

    @classmethod
    def load(cls, path: Path) -> Prompts:
        """Read them."""
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls(path=path, token_ids=[line["token_ids"] for line in lines])


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a rank decoded.

    Attributes:
        tokens: new tokens by index of the prompt; of this rank's prompts at least.
        prefill_seconds: until the first new token.
        decode_seconds: for all further ones.
        details: whatever else the system counts itself.
    """

    tokens: dict[int, list[int]]
    prefill_seconds: float
    decode_seconds: float
    details: dict[str, Any] = field(default_factory=dict)


Decode = Callable[[Prompts, int], Decoded]
Load = Callable[[Path, Mapping[str, Any]], Decode]


def measure(decode: Decode, prompts: Prompts, steps: int) -> dict[str, Any]:
    """Decode on all ranks; what all of them saw, on every rank.

    Seconds are the slowest rank's; bytes are what the interfaces of all nodes sent, and what the
    trunks between racks carried, headers included.
    """
    before = read_counters()
    dist.barrier()
    decoded = decode(prompts, steps)
    dist.barrier()
    sent = [now - then for now, then in zip(read_counters(), before, strict=True)]
    mine = (decoded.tokens, decoded.prefill_seconds, decoded.decode_seconds, sent)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    tokens = {index: ids for part in everyone for index, ids in part[0].items()}
    num_bytes, trunk_bytes = (sum(part[3][index] for part in everyone) for index in range(2))
    return {
        "tokens": [tokens[index] for index in sorted(tokens)],
        "prefill_seconds": max(part[1] for part in everyone),
        "decode_seconds": max(part[2] for part in everyone),
        "sent_bytes": num_bytes,
        "trunk_bytes": trunk_bytes,
        **decoded.details,
    }


def read_counters() -> tuple[int, int]:
    """Bytes this node has sent by eth0, and those that left racks by their trunks.

    A node's first rank reads its own interface, rank 0 the trunks, all others nothing.
    """
    if local_rank() or not COUNTERS.exists():
        return 0, 0
    sent = int((COUNTERS / "tx_bytes").read_text("ascii"))
    return sent, sum(map(trunk_bytes, range(racks()))) if dist.get_rank() == 0 else 0


def racks() -> int:
    """Racks of the cluster in a box that this runs in; 0 if there are no trunks."""
    count = int(os.environ.get("BOX_RACKS", "1"))
    return count if count > 1 else 0


def trunk_bytes(rack: int) -> int:
    """Bytes that have left a rack."""
    show = ["ip", "-n", os.environ["BOX_SWITCH"], "-s", "-j", "link", "show", "dev", f"t{rack}"]
    done = subprocess.run(show, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)[0]["stats64"]["tx"]["bytes"])


def local_rank() -> int:
    """This rank's number on its node."""
    return int(os.environ["LOCAL_RANK"])


def failing_alike(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns and None, or None and the first rank's error: the same on all ranks."""
    result, error = None, None
    # Whatever a peer raises marks its arm as failed and nothing else.
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = work()
    except (Exception, SystemExit) as caught:
        error = f"{type(caught).__name__}: {caught}"
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((text for text in errors if text is not None), None)
    return (None if first else result), first


def main(load: Load) -> None:
    """One peer alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16, help="new tokens of each prompt")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON for the peer")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    prompts, start = Prompts.load(args.prompts), time.perf_counter()
    result, error = failing_alike(
        lambda: measure(load(args.checkpoint, args.options), prompts, args.steps)
    )
    if dist.get_rank() == 0:
        seconds = time.perf_counter() - start
        print(json.dumps({"error": error, "seconds": seconds, **(result or {}), **rate(result)}))
    dist.destroy_process_group()


def rate(result: dict[str, Any] | None) -> dict[str, float]:
    """Decoded tokens a second, over all requests."""
    if result is None or not result["decode_seconds"]:
        return {}
    count = sum(len(ids) - 1 for ids in result["tokens"])
    return {"tokens_per_second": count / result["decode_seconds"]}
