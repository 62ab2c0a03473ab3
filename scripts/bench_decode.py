"""Decode speed: our engine beside transformers on one rank, and protocols beside each other on four.

    python scripts/bench_decode.py --json            # both comparisons, both reference models
    python scripts/bench_decode.py --profile         # and what a step's time goes to
    python scripts/bench_decode.py --parts formats   # greedy tokens that two number formats share

Prompts are windows of one length of the held-out part of `exflow sample-corpus`, decoded greedily,
end tokens ignored. Decode is timed from the first new token of all prompts to the last one, so
without prefill. Repeats of the arms alternate; figures are medians, ratios medians of the
repeats' ratios. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.generation import BaseStreamer

from exflow.assets import resolve_model
from exflow.models.checkpoint import Checkpoint
from exflow.profile import ProfileOptions, profile
from exflow.profiling.checkpoint import load_model, load_tokenizer
from exflow.runtime.engine import EngineOptions
from exflow.runtime.model import ModelOptions, load_engine, prepare_model
from exflow.runtime.ranks import Ranks
from exflow.runtime.requests import Request, SamplingParams
from exflow.sample_corpus import write_sample_corpus
from placement.strategies import PlacementOptions, get_strategy
from placement.topology import Topology

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.peers.prepare import windows

MODELS = ("pile-moe-top1", "pile-moe-top4")
# The load cap asked of each model's plan, as in scripts/quickstart.py.
IMBALANCE = {"pile-moe-top1": 1.25, "pile-moe-top4": 1.1}
PARTS = ("transformers", "protocols", "formats")
EXPERTS = ("eager", "grouped_mm", "batched_mm")
PROTOCOLS = {  # protocol, dispatch, plan
    "home/linear": ("home", "flat", None),
    "coherent/affinity": ("coherent", "flat", "plan.json"),
    "coherent/affinity, replicated": ("coherent", "replicated", "plan.json"),
}


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One run of an arm: tokens of every prompt, decode seconds, seconds by section if known."""

    tokens: list[list[int]]
    seconds: float
    sections: dict[str, float]


Arm = Callable[[list[list[int]], int], Timed]


class Stopwatch(BaseStreamer):
    """Notes when `generate` has tokens; the first call brings the prompts."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Tokens are there."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """No more tokens."""


def transformers_arm(model: str, *, experts: str, dtype: str = "float32") -> Arm:
    """`generate` with SDPA attention, a dynamic cache, and these experts."""
    net = load_model(resolve_model(model), dtype=dtype, device="cpu")
    net.set_experts_implementation(experts)
    net.generation_config.eos_token_id = None

    @torch.inference_mode()
    def decode(prompts: list[list[int]], steps: int) -> Timed:
        watch, ids = Stopwatch(), torch.tensor(prompts)
        made = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            do_sample=False,
            streamer=watch,
        )
        seconds = watch.times[-1] - watch.times[1]
        return Timed(tokens=made[:, ids.shape[1] :].tolist(), seconds=seconds, sections={})

    return decode


def exflow_arm(
    model: str,
    *,
    protocol: str = "coherent",
    dispatch: str = "auto",
    plan: Path | None = None,
    batch_size: int,
    dtype: str = "float32",
) -> Arm:
    """The engine of `exflow run` on this rank, without a tokenizer: tokens in, tokens out."""
    ranks = Ranks.from_environment()
    engine_options = EngineOptions(
        protocol=protocol,  # type: ignore[arg-type]
        dispatch=dispatch,  # type: ignore[arg-type]
        batch_size=batch_size,
    )
    options = ModelOptions(model=model, plan=plan, engine=engine_options, dtype=dtype, device="cpu")
    prepared = replace(prepare_model(options, ranks), tokenizer=None)
    engine = load_engine(prepared, Checkpoint(prepared.folder), ranks)

    def decode(prompts: list[list[int]], steps: int) -> Timed:
        params = SamplingParams(max_tokens=steps, ignore_eos=True)
        requests = [
            Request(index=index, id=index, prompt="", token_ids=tuple(ids), params=params)
            for index, ids in enumerate(prompts)
        ]
        times: list[float] = []
        engine.metrics["decode"].seconds.clear()
        made = list(engine.generate(requests, on_token=lambda _: times.append(time.perf_counter())))
        tokens = {done.request.index: list(done.token_ids) for done in made}
        seconds = times[-1] - times[len(prompts) - 1] if times else 0.0
        sections = dict(engine.metrics["decode"].seconds)
        ordered = [tokens[index] for index in range(len(prompts))]
        return Timed(tokens=ordered, seconds=seconds, sections=sections)

    return decode


def interleave(
    arms: dict[str, Arm], prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, list[Timed]]:
    """A warm-up, then repeats of all arms in turn; an error if they make different tokens."""
    runs: dict[str, list[Timed]] = {name: [] for name in arms}
    for _ in range(args.repeats + 1):
        for name, arm in arms.items():
            runs[name].append(arm(prompts, args.steps))
    first, *others = (timed[0].tokens for timed in runs.values())
    if any(tokens != first for tokens in others):
        msg = f"{', '.join(arms)} do not make the same tokens"
        raise SystemExit(msg)
    return {name: timed[1:] for name, timed in runs.items()}


def ratio(runs: dict[str, list[Timed]], ours: str, theirs: str) -> float:
    """How many times as fast our arm is: the median over the repeats."""
    pairs = zip(runs[ours], runs[theirs], strict=True)
    return round(median(their.seconds / our.seconds for our, their in pairs), 2)


def speeds(runs: dict[str, list[Timed]], args: argparse.Namespace) -> dict[str, float]:
    """Decoded tokens a second of each arm, the median."""
    count = args.batch_size * (args.steps - 1)
    return {
        name: round(count / median(timed.seconds for timed in arm), 1) for name, arm in runs.items()
    }


def shares(runs: list[Timed]) -> dict[str, float]:
    """What share of decode each section has; "other" is the scheduler and what calls the steps."""
    total = sum(timed.seconds for timed in runs)
    names = sorted({name for timed in runs for name in timed.sections})
    found = {name: sum(timed.sections.get(name, 0.0) for timed in runs) for name in names}
    found["other"] = total - sum(found.values())
    return {name: round(seconds / total, 3) for name, seconds in found.items()}


def compare_with_transformers(
    model: str, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """One rank: our engine beside every way in which transformers runs experts."""
    arms = {f"transformers {kind}": transformers_arm(model, experts=kind) for kind in EXPERTS}
    arms["exflow"] = exflow_arm(model, batch_size=args.batch_size)
    runs = interleave(arms, prompts, args)
    found = speeds(runs, args)
    fastest = max((name for name in arms if name != "exflow"), key=found.__getitem__)
    result = {"ratio": ratio(runs, "exflow", fastest), "fastest": fastest, "tokens_per_s": found}
    return result | ({"profile": shares(runs["exflow"])} if args.profile else {})


def compare_protocols(
    model: str, prompts: list[list[int]], folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Four ranks: this script again under torchrun, with a plan fitted on the corpus's other part."""
    trace = profile(
        resolve_model(model),
        [folder / "corpus" / "profile"],
        folder / f"{model}.safetensors",
        options=ProfileOptions(tokens=args.profile_tokens, max_length=256, batch_size=32),
    )
    assert trace is not None
    placed = get_strategy("affinity")(
        replace(trace, model=model),
        Topology(num_nodes=1, ranks_per_node=args.ranks),
        slots_per_rank=None,
        options=PlacementOptions(max_imbalance=IMBALANCE[model]),
    )
    placed.save(folder / "plan.json")
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(args.ranks), __file__, "--worker", str(folder)]
    command += ["--models", model, "--steps", str(args.steps), "--repeats", str(args.repeats)]
    command += ["--profile"] if args.profile else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def run_rank(args: argparse.Namespace) -> None:
    """One rank of `compare_protocols`; the first writes the result."""
    torch.set_num_threads(1)
    folder, ranks = args.worker, Ranks.from_environment()
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    args.batch_size = len(prompts)
    with ranks.connected(torch.device("cpu")):
        arms = {
            name: exflow_arm(
                args.models[0],
                protocol=protocol,
                dispatch=dispatch,
                plan=None if plan is None else folder / plan,
                batch_size=len(prompts),
            )
            for name, (protocol, dispatch, plan) in PROTOCOLS.items()
        }
        runs = interleave(arms, prompts, args)
    if not ranks.is_first:
        return
    home, flat, replicated = PROTOCOLS
    result = {
        "ratio": ratio(runs, replicated, home),
        "ratio_flat": ratio(runs, flat, home),
        "tokens_per_s": speeds(runs, args),
    }
    if args.profile:
        result["profile"] = {name: shares(timed) for name, timed in runs.items()}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def compare_formats(
    model: str, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, float]:
    """The share of greedy tokens, and of whole completions, that each pair of arms has alike."""
    arms = {
        f"{side} {dtype}": exflow_arm(model, dtype=dtype, batch_size=args.batch_size)
        if side == "exflow"
        else transformers_arm(model, dtype=dtype, experts="eager")
        for side in ("exflow", "transformers")
        for dtype in ("bfloat16", "float32")
    }
    made = {name: arm(prompts, args.steps).tokens for name, arm in arms.items()}
    pairs = (("exflow bfloat16", other) for other in list(made)[1:])
    pairs = [*pairs, ("transformers bfloat16", "transformers float32")]
    return {f"{one}, {other}": round(agreement(made[one], made[other]), 4) for one, other in pairs}


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that are alike; after a difference two texts part for good."""
    pairs = [
        pair
        for one, other in zip(ours, theirs, strict=True)
        for pair in zip(one, other, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS[:2]), choices=PARTS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=65, help="new tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the one rank")
    parser.add_argument("--profile-tokens", type=int, default=30_000, help="to fit plans on")
    parser.add_argument("--profile", action="store_true", help="shares of a step")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_model(model: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All parts for one model."""
    tokenizer = load_tokenizer(resolve_model(model))
    found = windows(tokenizer, folder / "corpus" / "heldout", args.prompt_tokens)
    prompts = [ids for _, ids in islice(found, args.batch_size)]
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "transformers": lambda: compare_with_transformers(model, prompts, args),
        "protocols": lambda: compare_protocols(model, prompts, folder, args),
        "formats": lambda: compare_formats(model, prompts, args),
    }
    results = {}
    for part in args.parts:
        results[part] = parts[part]()
        if not args.json:
            print(f"{model}, {part}: {json.dumps(results[part], indent=1)}", flush=True)
    return results


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By figure, then by model."""

    def collect(part: str, key: str) -> dict[str, Any]:
        return {model: found[part][key] for model, found in results.items() if part in found}

    speeds = {
        model: {
            arm: speed
            for part in found.values()
            for arm, speed in part.get("tokens_per_s", {}).items()
        }
        for model, found in results.items()
    }
    return {
        "ratio_vs_transformers": collect("transformers", "ratio"),
        "ratio_coherent_vs_home": collect("protocols", "ratio"),
        "ratio_coherent_flat_vs_home": collect("protocols", "ratio_flat"),
        "tokens_per_s": speeds,
    }


def main() -> None:
    """Run the parts asked for."""
    args = parse_arguments()
    if args.worker is not None:
        run_rank(args)
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as name:
        folder = Path(name)
        write_sample_corpus(folder / "corpus")
        results = {model: run_model(model, folder, args) for model in args.models}
    print(json.dumps(summarise(results)))


if __name__ == "__main__":
    main()
