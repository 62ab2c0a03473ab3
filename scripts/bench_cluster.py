"""Decode on a cluster in a box: home and coherent, linear and affinity placement, and other systems.

    python scripts/bench_cluster.py --nodes 2 --ranks-per-node 2 --rate 50mbit --json

Needs root (network namespaces) and, for --peers, the extra [bench]. Each model is profiled, placed
and decoded with the same prompts by all arms, in one process group, repeats interleaved; an arm
whose greedy tokens are not those of the unsharded model has failed. Models called planted-... are
random, of the size asked for, with a router whose affinity was put there (planted_model.py); the
others are trained. The last line is JSON: per model and arm the medians, and `speedup`, the decode
rate of coherent/affinity over every other arm's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = "coherent/affinity"
ARMS = ("home/linear", "home/affinity", "coherent/linear", SUBJECT)
PEERS = ("autoep", "transformers_ep", "deepspeed_moe")
PLANTED = {"planted-top1": (16, 1), "planted-top4": (32, 4)}
TRAINED = ("pile-moe-top1", "pile-moe-top4")
# Requests in flight, enough that rows and not messages are what is sent, and tokens of a prompt.
LOADS = {
    "pile-moe-top1": (512, 16),
    "pile-moe-top4": (256, 16),
    "planted-top1": (256, 4),
    "planted-top4": (128, 4),
}
MAX_IMBALANCE = {"pile-moe-top1": 1.25, "planted-top1": 1.25}
# By plan: what `exflow place` is asked for.
PLANS = {
    "linear": ("--strategy", "linear"),
    "home-affinity": ("--protocol", "home"),
    "coherent-affinity": ("--protocol", "coherent"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; see the command line."""

    nodes: int
    ranks_per_node: int
    rate: str | None
    models: list[str]
    peers: list[str]
    requests: int | None
    prompt_tokens: int | None
    steps: int
    repeats: int
    hidden_size: int
    layers: int
    kv_ratio: float
    out: Path
    json: bool


def main() -> None:
    """Measure every model; print tables and the JSON."""
    settings, start = parse_arguments(), time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    box(settings, "--per-node", "--", "true")  # without root it ends here, not after profiling
    corpus = settings.out / "corpus"
    if not corpus.exists():
        exflow("sample-corpus", "-o", corpus)
    results = {name: measure(name, corpus, settings) for name in settings.models}
    shape = {"nodes": settings.nodes, "ranks_per_node": settings.ranks_per_node}
    shape |= {"rate": settings.rate, "steps": settings.steps, "repeats": settings.repeats}
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({**shape, "models": results, "seconds": seconds}))
    if any(arm["failed"] for result in results.values() for arm in result["arms"].values()):
        sys.exit(1)


def parse_arguments() -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--rate", help="of each node's link, such as 50mbit; default unlimited")
    parser.add_argument(
        "--models", nargs="+", choices=(*TRAINED, *PLANTED), default=[*TRAINED, *PLANTED]
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--requests", type=int, help="in flight, over all ranks; default by model")
    parser.add_argument("--prompt-tokens", type=int, help="of each request; default by model")
    parser.add_argument("--steps", type=int, default=9, help="new tokens of a request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=512, help="of planted models")
    parser.add_argument("--layers", type=int, default=6, help="of planted models")
    parser.add_argument("--kv-ratio", type=float, default=0.125, help="of planted models")
    parser.add_argument("--out", type=Path, default=Path("out/cluster"))
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    counts = [args.requests or requests for requests, _ in LOADS.values()]
    if any(count % (args.nodes * args.ranks_per_node) for count in counts):
        parser.error("--requests must be a multiple of the ranks, so that all have the same share")
    if args.steps < 2 or args.repeats < 1:
        parser.error("--steps must be at least 2 and --repeats at least 1")
    return Settings(**vars(args))


def measure(name: str, corpus: Path, settings: Settings) -> dict[str, Any]:
    """Prepare a model, run all arms, summarise."""
    folder = settings.out / name
    folder.mkdir(exist_ok=True)
    checkpoint = write_checkpoint(name, folder, settings)
    prompts = prepare(name, checkpoint, corpus, folder, settings)
    expected = [json.loads(line)["expected"] for line in prompts.read_text("utf-8").splitlines()]
    job = {
        "checkpoint": str(checkpoint),
        "prompts": str(prompts),
        "steps": settings.steps,
        "repeats": settings.repeats,
        "results": str((folder / "results.json").resolve()),
        "arms": [our_arm(arm, folder) for arm in ARMS]
        + [{"name": peer, "peer": peer} for peer in settings.peers],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    box(
        settings, "--", "python", "-m", "scripts.peers.worker", str((folder / "job.json").resolve())
    )
    arms = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    result = summarise(arms, expected)
    if name in PLANTED:
        result["planted"] = json.loads((checkpoint / "planted.json").read_text(encoding="utf-8"))
    if not settings.json:
        print(table(name, result))
    return result


def write_checkpoint(name: str, folder: Path, settings: Settings) -> Path:
    """The folder of the model's checkpoint; planted ones are written first."""
    if name in TRAINED:
        return ROOT / "exflow/assets" / name
    experts, top_k = PLANTED[name]
    checkpoint = (folder / name).resolve()
    sizes = ("--hidden-size", settings.hidden_size, "--num-layers", settings.layers)
    routing = ("--num-experts", experts, "--top-k", top_k, "--kv-ratio", settings.kv_ratio)
    call([sys.executable, ROOT / "scripts/planted_model.py", checkpoint, *sizes, *routing])
    return checkpoint


def prepare(name: str, checkpoint: Path, corpus: Path, folder: Path, settings: Settings) -> Path:
    """Profile decode, place for both protocols, choose prompts; the file of prompts."""
    trace = folder / "trace.safetensors"
    requests, prompt_tokens = LOADS[name]
    requests = settings.requests or requests
    prompt_tokens = settings.prompt_tokens or prompt_tokens
    exflow(
        *("profile", checkpoint, corpus / "profile", "-o", trace, "--mode", "decode"),
        *("--overwrite", "--prompt-tokens", prompt_tokens, "--new-tokens", 32),
        *("--tokens", 16_000, "--batch-size", 64),
    )
    shape = ("--nodes", settings.nodes, "--ranks-per-node", settings.ranks_per_node)
    load = ("--max-imbalance", MAX_IMBALANCE.get(name, 1.15))
    for plan, options in PLANS.items():
        cap = () if plan == "linear" else load
        path = folder / f"plan-{plan}.json"
        exflow("place", trace, "-o", path, *shape, "--no-compare", *options, *cap)
    prompts = (folder / "prompts.jsonl").resolve()
    module = [sys.executable, "-m", "scripts.peers.prepare", checkpoint]
    counts = ("--requests", requests, "--prompt-tokens", prompt_tokens)
    held_out = (corpus / "heldout").resolve()
    call([*module, held_out, "-o", prompts, *counts, "--steps", settings.steps])
    return prompts


def our_arm(arm: str, folder: Path) -> dict[str, Any]:
    """How the worker runs an arm of ours."""
    protocol, placement = arm.split("/")
    plan = "linear" if placement == "linear" else f"{protocol}-affinity"
    options = {
        "protocol": protocol,
        "plan": str((folder / f"plan-{plan}.json").resolve()),
        "folder": str((folder / arm.replace("/", "-")).resolve()),
    }
    return {"name": arm, "peer": "exflow_run", "options": options}


def summarise(arms: list[dict[str, Any]], expected: list[list[int]]) -> dict[str, Any]:
    """Medians by arm, and what coherent/affinity gains over each."""
    rows = {arm["name"]: summarise_arm(arm, expected) for arm in arms}
    ours = rows[SUBJECT]
    others = {name: row for name, row in rows.items() if name != SUBJECT}

    def compare(key: str, *, more_is_better: bool) -> dict[str, float | None]:
        gains: dict[str, float | None] = {}
        for name, row in others.items():
            if row["failed"] or ours["failed"] or not row[key]:
                gains[name] = None
                continue
            gain = ours[key] / row[key]
            gains[name] = round(gain if more_is_better else 1 / gain, 3)
        return gains

    return {
        "requests": len(expected),
        "arms": rows,
        "speedup": compare("tokens_s", more_is_better=True),
        "fewer_bytes": compare("interface_bytes", more_is_better=False),
    }


def summarise_arm(arm: dict[str, Any], expected: list[list[int]]) -> dict[str, Any]:
    """One arm: medians, the range of its rates, and whether it failed."""
    runs, failed = arm["runs"], arm["error"]
    if failed is None and any(run["tokens"] != expected for run in runs):
        failed = "tokens differ from the unsharded model's"
    if not runs:
        return {"failed": failed or "it did not run"}
    rates = [run["tokens_per_second"] for run in runs]
    row = {
        "failed": failed,
        "tokens_s": round(statistics.median(rates), 1),
        "tokens_s_range": [round(min(rates), 1), round(max(rates), 1)],
        "step_ms": statistics.median(run["ms"] for run in runs),
        "interface_bytes": round(arm["per_token"]["sent_bytes"], 1),
        "own_bytes": median(runs, "own_bytes_per_token"),
    }
    if row["own_bytes"]:
        row["interface_over_own"] = round(row["interface_bytes"] / row["own_bytes"], 4)
        payload = arm["per_token"]["sent_payload"]
        row["without_headers_over_own"] = round(payload / row["own_bytes"], 4)
        row["rows_per_token"] = round(runs[0]["rows_per_token"], 3)
        row["as_predicted"] = all(run["measured_equals_predicted"] for run in runs)
    return row


def median(runs: list[dict[str, Any]], key: str) -> float | None:
    """The median of what all runs counted."""
    values = [run[key] for run in runs if key in run]
    return round(statistics.median(values), 1) if values else None


def table(name: str, result: dict[str, Any]) -> str:
    """One model's arms as lines of text."""
    note = " (random weights, planted affinity)" if "planted" in result else ""
    lines = [f"{name}{note}"]
    lines.append(
        f"  {'arm':20}{'tokens/s':>10}{'step ms':>10}{'bytes a token':>15}{'/ own':>8}{'speedup':>9}"
    )
    for arm, row in result["arms"].items():
        if row["failed"]:
            lines.append(f"  {arm:20}  failed: {row['failed']}")
            continue
        cells = f"{row['tokens_s']:10.0f}{row['step_ms']:10.1f}{row['interface_bytes'] or 0:15.0f}"
        own = row.get("interface_over_own", "")
        lines.append(f"  {arm:20}{cells}{own:>8}{result['speedup'].get(arm) or '':>9}")
    return "\n".join(lines)


def box(settings: Settings, *arguments: str) -> None:
    """Run a command on the cluster."""
    shape = ["--nodes", settings.nodes, "--ranks-per-node", settings.ranks_per_node]
    rate = ["--rate", settings.rate] if settings.rate else []
    call([sys.executable, "-m", "launch.cluster_in_a_box", "run", *shape, *rate, *arguments])


def exflow(*arguments: object) -> None:
    """Run one `exflow` command, its results shown on stderr."""
    call([sys.executable, "-m", "exflow", *arguments])


def call(command: list[Any]) -> None:
    """Run a command in a calm thread setting; stop at the first failure."""
    words = [str(word) for word in command]
    print("$ " + shlex.join(words), file=sys.stderr, flush=True)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment = os.environ | threads | {"PYTHONPATH": path}
    done = subprocess.run(words, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        print(f"it failed with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
