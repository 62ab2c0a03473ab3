"""`exflow run`, called in a process group that exists; its own counts are taken from its metrics.

Options: plan (a file), protocol, folder for its files, and whether it shall count (metrics): for that
it gathers the routing of all tokens at the end, which would be taken for traffic of decode.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from scripts.peers.interface import Decoded, main

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.peers.interface import Decode, Prompts

SHARED_WITH_ALL = ("counts", "tokens", "kv_share")


def load(checkpoint: Path, options: Mapping[str, Any]) -> Decode:
    """A function that runs the command; weights are read each time, outside of what is timed."""
    folder = Path(options.get("folder", "."))
    folder.mkdir(parents=True, exist_ok=True)
    has_metrics = options.get("metrics", True)

    def decode(prompts: Prompts, steps: int) -> Decoded:
        output, metrics = folder / "out.jsonl", folder / "metrics.json"
        if dist.get_rank() == 0:
            output.unlink(missing_ok=True)
        dist.barrier()
        call(
            *("run", checkpoint, "--prompts", prompts.path, "-o", output),
            *(("--metrics", metrics) if has_metrics else ()),
            *("--protocol", options["protocol"], "--max-new-tokens", steps, "--ignore-eos"),
            *("--batch-size", len(prompts.token_ids)),
            *(("--plan", options["plan"]) if options.get("plan") else ()),
        )
        if dist.get_rank():
            return Decoded(tokens={}, prefill_seconds=0.0, decode_seconds=0.0)
        counts = json.loads(metrics.read_text(encoding="utf-8")) if has_metrics else None
        return read(output, counts)

    return decode


def load_quiet(checkpoint: Path, options: Mapping[str, Any]) -> Decode:
    """The same without metrics, to count bytes of."""
    return load(checkpoint, {**options, "metrics": False})


def call(*arguments: object) -> None:
    """One `exflow` command in this process."""
    import exflow.cli

    arguments_before = sys.argv
    sys.argv = ["exflow", *map(str, arguments)]
    try:
        exflow.cli.main()
    except SystemExit as end:
        if end.code:
            msg = f"exflow ended with exit code {end.code}"
            raise RuntimeError(msg) from end
    finally:
        sys.argv = arguments_before


def read(output: Path, metrics: dict[str, Any] | None) -> Decoded:
    """Tokens by index of the prompt, and the decode phase's own counts."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    tokens = {int(line["id"]): line["token_ids"] for line in lines}
    if metrics is None:
        return Decoded(tokens=tokens, prefill_seconds=0.0, decode_seconds=0.0)
    decode = metrics["phases"]["decode"]
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    return Decoded(
        tokens=tokens,
        prefill_seconds=sum(metrics["phases"]["prefill"]["seconds"].values()),
        decode_seconds=sum(decode["seconds"].values()),
        details={
            "own_bytes": inter_node_bytes(decode, metrics["world_size"], ranks_per_node),
            "rows_per_token": metrics["rows_per_token"]["total"],
            "measured_equals_predicted": metrics["measured_equals_predicted"],
            "messages": decode["messages"],
            "seconds_by_section": decode["seconds"],
        },
    )


def inter_node_bytes(phase: Mapping[str, Any], ranks: int, ranks_per_node: int) -> float:
    """Bytes that left a node, of a phase of metrics.json.

    Rows are counted by link. What a rank shares goes to every other rank alike, in one domain.
    """
    node = np.arange(ranks) // ranks_per_node
    is_between = node[:, None] != node
    rows = {kind: np.array(counts).sum(axis=0) for kind, counts in phase["rows"].items()}
    num_bytes = phase["bytes"]
    all_rows = sum(int(counts.sum()) for counts in rows.values())
    between = sum(int(counts[is_between].sum()) for counts in rows.values())
    dispatched = max(1, int(rows["dispatch"].sum()))
    total = num_bytes.get("payload", 0) * between / max(1, all_rows)
    total += num_bytes.get("metadata", 0) * rows["dispatch"][is_between].sum() / dispatched
    shared = sum(num_bytes.get(kind, 0) for kind in SHARED_WITH_ALL)
    return float(total + shared * (ranks - ranks_per_node) / max(1, ranks - 1))


if __name__ == "__main__":
    main(load)
