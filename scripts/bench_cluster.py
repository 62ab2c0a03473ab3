"""Decode on a cluster in a box: home and coherent, linear and affinity placement, and other systems.

    python scripts/bench_cluster.py --nodes 2 --ranks-per-node 2 --rate 50mbit --json

Needs root (network namespaces). Each model is profiled, placed and decoded with the same prompts by
all arms, in one process group, repeats interleaved; an arm whose greedy tokens are not those of the
unsharded model has failed. home/flat is home/linear without sending a row once to a node, the rest
of ours cross to a node once; coherent/replicas has 25% more slots for experts; auto/affinity lets the
time model choose, by the links' rates. Peers run if the extra [bench] is installed. Models called
planted-... are random, of the size asked for, with a router whose affinity was put there
(planted_model.py); the others are trained. With --racks a plan's "node" is a rack, so that the
trunks between racks are what it saves.

The last line is JSON: by model and rate the medians of each arm, and `speedup`, the decode rate of
coherent/affinity over every other arm's, and `speedup_with_replicas`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.cluster_in_a_box.cluster import bits_per_second  # noqa: E402
from scripts.peers.prediction import fastest_plan, predict  # noqa: E402
from scripts.peers.summary import SUBJECT, summarise, table  # noqa: E402

UNSHAPED = "unshaped"
# By arm: protocol, plan and dispatch.
ARMS = {
    "home/flat": ("home", "linear", "flat"),
    "home/linear": ("home", "linear", "auto"),
    "home/affinity": ("home", "home-affinity", "auto"),
    "coherent/linear": ("coherent", "linear", "auto"),
    SUBJECT: ("coherent", "coherent-affinity", "auto"),
    "coherent/replicas": ("coherent", "coherent-replicas", "auto"),
    "auto/affinity": ("auto", "", "auto"),
}
PEERS = ("autoep", "transformers_ep", "deepspeed_moe")
# Experts, experts a token, and a strength at which plans save what they save for gpt-oss-20b
# (planted_affinity.py).
PLANTED = {"planted-top1": (16, 1, 2.4), "planted-top4": (32, 4, 2.4)}
EXPERTS = {name: planted[0] for name, planted in PLANTED.items()}
EXPERTS |= {"pile-moe-top1": 16, "pile-moe-top4": 32}
# Requests in flight, enough that rows and not messages are what is sent, and tokens of a prompt.
LOADS = {
    "pile-moe-top1": (512, 16),
    "pile-moe-top4": (256, 16),
    "planted-top1": (256, 4),
    "planted-top4": (128, 4),
}
MAX_IMBALANCE = {"pile-moe-top1": 1.25, "planted-top1": 1.5, "planted-top4": 1.5}
MORE_SLOTS = 1.25
EFFORT = 8
LOOPBACK = 1e9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; see the command line."""

    nodes: int
    ranks_per_node: int
    rate: list[str]
    racks: int
    trunk_rate: str | None
    models: list[str]
    arms: list[str]
    peers: list[str]
    requests: int | None
    prompt_tokens: int | None
    steps: int
    repeats: int
    hidden_size: int
    layers: int
    kv_ratio: float
    max_imbalance: float | None
    reuse: bool
    out: Path
    json: bool

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    @property
    def units(self) -> int:
        """What the slow links lie between: racks if there are several, else nodes."""
        return self.racks if self.racks > 1 else self.nodes


def main() -> None:
    """Measure every model; print tables and the JSON."""
    settings, start = parse_arguments(), time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    box(settings, UNSHAPED, "--per-node", "--", "true")  # without root it ends here
    corpus = settings.out / "corpus"
    if not corpus.exists():
        exflow("sample-corpus", "-o", corpus)
    results = {name: measure(name, corpus, settings) for name in settings.models}
    shown = ("nodes", "ranks_per_node", "racks", "trunk_rate", "steps", "repeats")
    shape = {key: getattr(settings, key) for key in shown}
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({**shape, "models": results, "seconds": seconds}))
    found = [rate for result in results.values() for rate in result["rates"].values()]
    if any(arm["failed"] for result in found for arm in result["arms"].values()):
        sys.exit(1)


def parse_arguments() -> Settings:
    """The command line."""
    has_peers = importlib.util.find_spec("deepspeed") is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--nodes", type=int, default=2)
    add("--ranks-per-node", type=int, default=2)
    add("--rate", nargs="+", default=[UNSHAPED], help="of each node's link: 50mbit, ...")
    add("--racks", type=int, default=1, help="the nodes stand in so many")
    add("--trunk-rate", help="of a rack's link to the others")
    add("--models", nargs="+", choices=LOADS, default=list(PLANTED))
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--peers", nargs="*", choices=PEERS, default=PEERS if has_peers else [])
    add("--requests", type=int, help="in flight, over all ranks; default by model")
    add("--prompt-tokens", type=int, help="of each request; default by model")
    add("--steps", type=int, default=5, help="new tokens of a request")
    add("--repeats", type=int, default=3)
    add("--hidden-size", type=int, default=512, help="of planted models")
    add("--layers", type=int, default=12, help="of planted models")
    add("--kv-ratio", type=float, default=0.125, help="of planted models: K + V over hidden")
    add("--max-imbalance", type=float, help="of the plans; default by model")
    add("--reuse", action="store_true", help="take models, plans and prompts that --out has")
    add("--out", type=Path, default=Path("out/cluster"))
    add("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    counts = [args.requests or LOADS[name][0] for name in args.models]
    if any(count % (args.nodes * args.ranks_per_node) for count in counts):
        parser.error("--requests must be a multiple of the ranks, so that all have the same share")
    if args.steps < 2 or args.repeats < 1:
        parser.error("--steps must be at least 2 and --repeats at least 1")
    if args.nodes % args.racks:
        parser.error("--racks must divide --nodes, so that all have the same number")
    return Settings(**vars(args))


def measure(name: str, corpus: Path, settings: Settings) -> dict[str, Any]:
    """Prepare a model, run all arms at every rate, summarise."""
    folder = (settings.out / name).resolve()
    checkpoint = folder / name if name in PLANTED else ROOT / "exflow/assets" / name
    if settings.reuse and (folder / "prompts.jsonl").exists():
        check_prepared(folder, settings)
    else:
        folder.mkdir(exist_ok=True)
        write_checkpoint(name, checkpoint, settings)
        prepare(name, checkpoint, corpus, folder, settings)
    result: dict[str, Any] = {"rates": {}}
    if name in PLANTED:
        result["planted"] = json.loads((checkpoint / "planted.json").read_text(encoding="utf-8"))
    for rate in settings.rate:
        result["rates"][rate] = run_arms(name, checkpoint, folder, rate, settings)
        if not settings.json:
            note = " (random weights, planted affinity)" if name in PLANTED else ""
            print(table(f"{name}{note}, {rate}", result["rates"][rate]), flush=True)
    return result


def check_prepared(folder: Path, settings: Settings) -> None:
    """What --reuse takes must be what is asked for."""
    lines = (folder / "prompts.jsonl").read_text("utf-8").splitlines()
    steps, requests = len(json.loads(lines[0])["expected"]), len(lines)
    asked = {"--steps": (settings.steps, steps), "--requests": (settings.requests, requests)}
    for option, (wanted, found) in asked.items():
        if wanted not in (None, found):
            print(
                f"{folder} was prepared with {option} {found}, not {wanted}; "
                f"give {option} {found}, or leave out --reuse to prepare it anew",
                file=sys.stderr,
            )
            sys.exit(2)


def write_checkpoint(name: str, checkpoint: Path, settings: Settings) -> None:
    """Planted models are written first."""
    if name not in PLANTED:
        return
    experts, top_k, strength = PLANTED[name]
    sizes = ("--hidden-size", settings.hidden_size, "--num-layers", settings.layers)
    routing = ("--num-experts", experts, "--top-k", top_k, "--strength", strength)
    cache = ("--kv-ratio", settings.kv_ratio)
    call([sys.executable, ROOT / "scripts/planted_model.py", checkpoint, *sizes, *routing, *cache])


def prepare(name: str, checkpoint: Path, corpus: Path, folder: Path, settings: Settings) -> None:
    """Profile decode, make all plans, choose prompts."""
    trace = folder / "trace.safetensors"
    requests, prompt_tokens = LOADS[name]
    requests = settings.requests or requests
    prompt_tokens = settings.prompt_tokens or prompt_tokens
    profile(checkpoint, corpus, trace, prompt_tokens=prompt_tokens, steps=settings.steps)
    shape = ("--nodes", settings.units, "--ranks-per-node", settings.ranks // settings.units)
    slots = math.ceil(EXPERTS[name] * MORE_SLOTS / settings.ranks)
    load = ("--max-imbalance", settings.max_imbalance or MAX_IMBALANCE.get(name, 1.15))
    plans: dict[str, tuple[object, ...]] = {
        "linear": ("--strategy", "linear"),
        "home-affinity": ("--protocol", "home", *load),
        "coherent-affinity": ("--protocol", "coherent", *load),
        "coherent-replicas": ("--protocol", "coherent", *load, "--slots-per-rank", slots),
    }
    wanted = {ARMS[arm][1] for arm in settings.arms}
    if "auto/affinity" in settings.arms:
        wanted |= {"home-affinity", "coherent-affinity"}
    for plan in wanted - {""}:
        path = folder / f"plan-{plan}.json"
        exflow("place", trace, "-o", path, *shape, "--no-compare", "--effort", EFFORT, *plans[plan])
    module = [sys.executable, "-m", "scripts.peers.prepare", checkpoint]
    counts = ("--requests", requests, "--prompt-tokens", prompt_tokens, "--steps", settings.steps)
    call([*module, (corpus / "heldout").resolve(), "-o", folder / "prompts.jsonl", *counts])


def profile(checkpoint: Path, corpus: Path, trace: Path, *, prompt_tokens: int, steps: int) -> None:
    """Record decode's routing."""
    exflow(
        *("profile", checkpoint, corpus / "profile", "-o", trace, "--mode", "decode"),
        *("--overwrite", "--prompt-tokens", prompt_tokens, "--new-tokens", steps),
        *("--tokens", 20_000, "--batch-size", 64),
    )


def run_arms(
    name: str, checkpoint: Path, folder: Path, rate: str, settings: Settings
) -> dict[str, Any]:
    """All arms at one rate."""
    lines = (folder / "prompts.jsonl").read_text("utf-8").splitlines()
    links = write_links(folder, rate, settings)
    requests = len(lines)
    ours = [our_arm(arm, checkpoint, folder, links, requests, settings) for arm in settings.arms]
    job = {
        "checkpoint": str(checkpoint),
        "prompts": str(folder / "prompts.jsonl"),
        "steps": settings.steps,
        "repeats": settings.repeats,
        "results": str(folder / "results.json"),
        "arms": ours + [{"name": peer, "peer": peer} for peer in settings.peers],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    worker = ("python", "-m", "scripts.peers.worker", folder / "job.json")
    box(settings, rate, "--", *worker)
    arms = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    result = summarise(arms, [json.loads(line)["expected"] for line in lines])
    for arm in ours:
        row = result["arms"][arm["name"]]
        if not row["failed"]:
            plan = Path(arm["options"]["plan"])
            row["predicted"] = predict(
                folder / "trace.safetensors",
                plan,
                checkpoint,
                links,
                requests,
                ran=row["ran"],
                backend="nvlink-one-sided" if row["dispatch"] == "flat" else "exflow",
            )
    return result


def write_links(folder: Path, rate: str, settings: Settings) -> Path:
    """The links' real rates and measured latencies, as the time model takes them: of a rank."""
    path = folder / f"links-{rate}.json"
    box(settings, rate, "--", "python", "-m", "exflow", "links", "-o", path)
    links = json.loads(path.read_text(encoding="utf-8"))
    slow = settings.trunk_rate if settings.racks > 1 else rate
    per_unit = settings.ranks // settings.units
    shared = LOOPBACK if slow in (None, UNSHAPED) else bits_per_second(slow) / 8 / per_unit
    inside = LOOPBACK
    if settings.racks > 1:
        links["intra_latency"] = links["inter_latency"]  # from node to node inside a rack
        if rate != UNSHAPED:
            inside = bits_per_second(rate) / 8 / settings.ranks_per_node
    links |= {"intra_bandwidth": inside, "inter_bandwidth": shared}
    path.write_text(json.dumps(links), encoding="utf-8")
    return path


def our_arm(
    arm: str, checkpoint: Path, folder: Path, links: Path, requests: int, settings: Settings
) -> dict[str, Any]:
    """How the worker runs an arm of ours."""
    protocol, plan, dispatch = ARMS[arm]
    options = {
        "protocol": protocol,
        "dispatch": dispatch,
        "folder": str(folder / arm.replace("/", "-")),
        "ranks_per_unit": settings.ranks // settings.units,
    }
    if protocol == "auto":
        trace = folder / "trace.safetensors"
        plans = [folder / f"plan-{name}.json" for name in ("coherent-affinity", "home-affinity")]
        options |= {"routing": str(trace), "links": str(links)}
        options["plan"] = str(fastest_plan(trace, plans, checkpoint, links, requests))
    else:
        options["plan"] = str(folder / f"plan-{plan}.json")
    return {"name": arm, "peer": "exflow_run", "options": options}


def box(settings: Settings, rate: str, *arguments: object) -> None:
    """Run a command on the cluster."""
    shape: list[object] = ["--nodes", settings.nodes, "--ranks-per-node", settings.ranks_per_node]
    if rate != UNSHAPED:
        shape += ["--rate", rate]
    if settings.racks > 1:
        shape += ["--racks", settings.racks]
        shape += ["--trunk-rate", settings.trunk_rate] if settings.trunk_rate else []
    call([sys.executable, "-m", "launch.cluster_in_a_box", "run", *shape, *arguments])


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
