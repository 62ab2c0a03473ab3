"""The main job, end to end, on this machine: text -> trace -> plan -> distributed decode -> report.

For both reference models it profiles a corpus made on the spot, places the experts on four ranks,
decodes held-out prompts under three arms (home/linear, coherent/linear, coherent/affinity), compares
every token with transformers on the unsharded checkpoint, and compares the rows counted on the wire
with the rows the traffic model predicts. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The load cap asked of each model's plan. Sixteen whole experts on four ranks are harder to balance
# than 32 finer ones of which a token uses four.
MODELS = {"pile-moe-top1": 1.25, "pile-moe-top4": 1.1}
ARMS = (("home", "linear"), ("coherent", "linear"), ("coherent", "affinity"))
NUM_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one quickstart does."""

    out: Path
    profile_tokens: int
    profile_batch: int
    num_prompts: int
    prompt_tokens: int
    new_tokens: int


def main() -> None:
    """Run every step, print the summary."""
    settings = parse_arguments()
    settings.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    corpus = settings.out / "corpus"
    exflow("sample-corpus", "-o", corpus)
    summaries = {name: run_model(name, corpus, settings) for name in MODELS}
    report = settings.out / "report.html"
    write_report(report, settings)
    say(f"report: {report}")
    print(json.dumps(summarise(summaries, report, seconds=time.monotonic() - start)))
    if not all(
        s["tokens_identical"] and s["measured_equals_predicted"] for s in summaries.values()
    ):
        sys.exit(1)


def parse_arguments() -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--profile-tokens", type=int, default=30_000)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    return Settings(
        out=args.out,
        profile_tokens=args.profile_tokens,
        profile_batch=64,
        num_prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
    )


def run_model(name: str, corpus: Path, settings: Settings) -> dict[str, Any]:
    """Profile, place and decode one model under every arm."""
    folder = settings.out / name
    folder.mkdir(exist_ok=True)
    trace = folder / "trace.safetensors"
    # Decode is what the plan is for, so decode is what is profiled.
    exflow(
        *("profile", name, corpus / "profile", "-o", trace, "--mode", "decode", "--overwrite"),
        *("--prompt-tokens", settings.prompt_tokens, "--new-tokens", settings.new_tokens),
        *("--tokens", settings.profile_tokens, "--batch-size", settings.profile_batch),
    )
    exflow("affinity", trace)
    place(trace, folder / "plan-linear.json", "--strategy", "linear", "--no-compare")
    place(trace, folder / "plan-affinity.json", "--max-imbalance", MODELS[name])
    prompts = folder / "prompts.jsonl"
    expected = write_prompts(name, corpus / "heldout", prompts, settings)
    arms = {
        f"{protocol}_{strategy}": decode(name, folder, protocol, strategy, expected, settings)
        for protocol, strategy in ARMS
    }
    rows = {arm: result["rows_per_token"] for arm, result in arms.items()}
    return {
        "tokens_identical": all(result["tokens_identical"] for result in arms.values()),
        "measured_equals_predicted": all(
            result["measured_equals_predicted"] for result in arms.values()
        ),
        "rows_per_token": rows,
        "reduction": 1 - rows["coherent_affinity"] / rows["home_linear"],
        "imbalance": arms["coherent_affinity"]["imbalance"],
        "imbalance_linear": arms["home_linear"]["imbalance"],
        "prompts": len(expected),
    }


def place(trace: Path, plan: Path, *arguments: object) -> None:
    """Place the experts on four ranks of one node."""
    exflow(*("place", trace, "-o", plan, "--nodes", 1, "--ranks-per-node", NUM_RANKS), *arguments)


def decode(
    name: str,
    folder: Path,
    protocol: str,
    strategy: str,
    expected: dict[str, list[int]],
    settings: Settings,
) -> dict[str, Any]:
    """Decode the prompts on four ranks under one arm; compare tokens and rows."""
    arm = f"{protocol}-{strategy}"
    outputs, metrics = folder / f"out-{arm}.jsonl", folder / f"metrics-{arm}.json"
    outputs.unlink(missing_ok=True)
    torchrun(
        *("run", name, "--plan", folder / f"plan-{strategy}.json"),
        *("--prompts", folder / "prompts.jsonl", "-o", outputs, "--protocol", protocol),
        *("--max-new-tokens", settings.new_tokens, "--ignore-eos"),
        *("--batch-size", settings.num_prompts, "--metrics", metrics),
        *("--record-trace", folder / f"decoded-{arm}.safetensors"),
    )
    lines = [json.loads(line) for line in outputs.read_text(encoding="utf-8").splitlines()]
    found = {line["id"]: line["token_ids"] for line in lines}
    measured = json.loads(metrics.read_text(encoding="utf-8"))
    return {
        "tokens_identical": found == expected,
        "measured_equals_predicted": measured["measured_equals_predicted"],
        "rows_per_token": measured["rows_per_token"]["total"],
        "imbalance": measured["predicted"]["imbalance"]["mean"],
    }


def write_prompts(name: str, corpus: Path, path: Path, settings: Settings) -> dict[str, list[int]]:
    """Write held-out prompts; return transformers' greedy tokens for each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from exflow.assets import resolve_model

    folder = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = choose_prompts(tokenizer, corpus, settings)
    lines = [json.dumps({"id": key, "prompt": text}) for key, text in prompts.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    expected: dict[str, list[int]] = {}
    for batch in by_length({key: tokenizer(text)["input_ids"] for key, text in prompts.items()}):
        generated = model.generate(
            torch.tensor(list(batch.values())),
            attention_mask=torch.ones(
                len(batch), len(next(iter(batch.values()))), dtype=torch.long
            ),
            max_new_tokens=settings.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = generated[:, -settings.new_tokens :].tolist()
        expected |= dict(zip(batch, new, strict=True))
    return expected


def choose_prompts(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, settings: Settings
) -> dict[str, str]:
    """The beginnings of the first held-out documents, which are in random order."""
    from exflow.corpus import read_documents

    prompts: dict[str, str] = {}
    for document in read_documents([corpus]):
        ids = tokenizer(document.text[: 16 * settings.prompt_tokens])["input_ids"]
        if len(ids) >= settings.prompt_tokens:
            key = f"{document.subset.lower().replace(' ', '-')}-{document.index}"
            prompts[key] = tokenizer.decode(ids[: settings.prompt_tokens])
        if len(prompts) == settings.num_prompts:
            break
    return prompts


def by_length(prompts: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """Prompts of equal length together, so that no padding enters the comparison."""
    groups: dict[int, dict[str, list[int]]] = defaultdict(dict)
    for key, ids in prompts.items():
        groups[len(ids)][key] = ids
    return list(groups.values())


def write_report(path: Path, settings: Settings) -> None:
    """One HTML file about both models."""
    arguments: list[object] = ["report", "-o", path]
    for name in MODELS:
        folder = settings.out / name
        arguments += ["--trace", folder / "trace.safetensors"]
        arguments += ["--held-out", folder / "decoded-home-linear.safetensors"]
        for strategy in ("linear", "affinity"):
            arguments += ["--plan", folder / f"plan-{strategy}.json"]
        for protocol, strategy in ARMS:
            arguments += ["--metrics", folder / f"metrics-{protocol}-{strategy}.json"]
    exflow(*arguments)


def summarise(summaries: dict[str, Any], report: Path, *, seconds: float) -> dict[str, Any]:
    """The last line of stdout."""
    checks = ("tokens_identical", "measured_equals_predicted")
    return {
        **{check: all(summary[check] for summary in summaries.values()) for check in checks},
        "models": summaries,
        "report": str(report),
        "seconds": round(seconds, 1),
    }


def exflow(*arguments: object) -> None:
    """Run one `exflow` command, its results shown on stderr."""
    call([sys.executable, "-m", "exflow", *map(str, arguments)])


def torchrun(*arguments: object) -> None:
    """Run one `exflow` command on four ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS)]
    call([*launcher, "--standalone", "-m", "exflow", *map(str, arguments)])


def call(command: list[str]) -> None:
    """Run a command in a calm thread setting; stop at the first failure."""
    say("$ " + shlex.join(["exflow" if part == sys.executable else part for part in command]))
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        say(f"the command above failed with exit code {done.returncode}")
        sys.exit(done.returncode)


def say(text: str) -> None:
    """Progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
