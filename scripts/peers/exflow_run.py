"""`exflow run`, called in a process group that exists; its own counts are taken from its metrics.

Options: plan (a file), protocol, dispatch, routing and links for protocol auto, folder for its files,
ranks_per_unit (of a node, or of a rack where trunks are what counts), and whether it shall count
(metrics): for that it gathers the routing of all tokens at the end, which would be taken for
traffic of decode.
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
from scripts.peers.summary import ms_by_part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.peers.interface import Decode, Prompts

SHARED_WITH_ALL = ("counts", "tokens")
PATHS = ("plan", "routing", "links")


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
            *(
                "--batch-size",
                len(prompts.token_ids),
                "--dispatch",
                options.get("dispatch", "auto"),
            ),
            *(word for name in PATHS if options.get(name) for word in (f"--{name}", options[name])),
        )
        if dist.get_rank():
            return Decoded(tokens={}, prefill_seconds=0.0, decode_seconds=0.0)
        counts = json.loads(metrics.read_text(encoding="utf-8")) if has_metrics else None
        return read(output, counts, options.get("ranks_per_unit"))

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


def read(output: Path, metrics: dict[str, Any] | None, ranks_per_unit: int | None) -> Decoded:
    """Tokens by index of the prompt, and the decode phase's own counts."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    tokens = {int(line["id"]): line["token_ids"] for line in lines}
    if metrics is None:
        return Decoded(tokens=tokens, prefill_seconds=0.0, decode_seconds=0.0)
    decode = metrics["phases"]["decode"]
    per_unit = ranks_per_unit or int(os.environ["LOCAL_WORLD_SIZE"])
    return Decoded(
        tokens=tokens,
        prefill_seconds=sum(metrics["phases"]["prefill"]["seconds"].values()),
        decode_seconds=sum(decode["seconds"].values()),
        details={
            "ran": f"{metrics['protocol']}, domain {metrics['coherence_domain']}",
            "own_bytes": bytes_between(metrics, per_unit),
            "rows_between": rows_between(decode, metrics["world_size"], per_unit),
            "dispatch": metrics["dispatch"],
            "rows_per_token": metrics["rows_per_token"]["total"],
            "measured_equals_predicted": metrics["measured_equals_predicted"],
            "messages": decode["messages"],
            "ms_by_part": ms_by_part(decode["seconds"], decode["steps"]),
        },
    )


def rows_between(phase: Mapping[str, Any], ranks: int, per_unit: int) -> int:
    """Rows that left a unit: a node, or a rack."""
    unit = np.arange(ranks) // per_unit
    is_between = unit[:, None] != unit
    return sum(int(np.array(rows).sum(axis=0)[is_between].sum()) for rows in phase["rows"].values())


def bytes_between(metrics: Mapping[str, Any], per_unit: int) -> float:
    """Bytes that left a unit while decoding.

    Rows are counted by link. Counts and tokens go to every other rank; keys and values too, in one
    domain, but where prompts go by hierarchical dispatch they cross to a unit once.
    """
    phase, ranks = metrics["phases"]["decode"], metrics["world_size"]
    num_bytes, num_rows = phase["bytes"], {}
    for kind in ("dispatch", "combine"):
        one_kind = {"rows": {kind: phase["rows"][kind]}}
        num_rows[kind] = rows_between(one_kind, ranks, per_unit), int(np.sum(phase["rows"][kind]))
    crossed, everything = (sum(counts) for counts in zip(*num_rows.values(), strict=True))
    total = num_bytes.get("payload", 0) * crossed / max(1, everything)
    crossed, dispatched = num_rows["dispatch"]
    total += num_bytes.get("metadata", 0) * crossed / max(1, dispatched)
    to_others = (ranks - per_unit) / max(1, ranks - 1)
    total += to_others * sum(num_bytes.get(kind, 0) for kind in SHARED_WITH_ALL)
    is_once = metrics["prefill_dispatch"] == "hierarchical"
    to_units = (ranks // per_unit - 1) / max(1, ranks - 1) if is_once else to_others
    crosses = metrics["coherence_domain"] > per_unit
    return float(total + crosses * to_units * num_bytes.get("kv_share", 0))


if __name__ == "__main__":
    main(load)
