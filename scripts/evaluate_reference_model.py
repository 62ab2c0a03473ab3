r"""Measure the reference models, as exported, and write docs/benchmarks/reference-models.{md,json}.

    python scripts/evaluate_reference_model.py --corpus CORPUS --runs out/train

CORPUS holds heldout.jsonl.zst and ood.jsonl.zst; --runs is the folder of the training runs (curves and
tokens). Every model is loaded with transformers; nothing is taken from the training code but its speed.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent))
from reference_model import kernels, model
from reference_model.model import Batch, init_parameters
from reference_model.report import draw, write_markdown
from train_reference_model import PRESETS

from exflow.corpus import read_documents
from exflow.profiling.checkpoint import load_model, load_tokenizer
from exflow.profiling.recorder import RoutingRecorder
from placement.evaluation import compare_strategies
from placement.statistics import describe
from placement.strategies import PlacementOptions
from placement.topology import Topology
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).parent.parent
WINDOW, ROWS = 256, 16
PLACED = 4  # placement is measured on one document in this many


def windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Iterator[tuple[str, int, list[int]]]:
    """Subset, document and at most WINDOW + 1 tokens, for about `limit` tokens a subset."""
    used: dict[str, int] = defaultdict(int)
    for document in read_documents([path]):
        if limit is not None and used[document.subset] >= limit:
            continue
        tokens = [0, *tokenizer(document.text)["input_ids"]]
        used[document.subset] += len(tokens) - 1
        for start in range(0, len(tokens) - 1, WINDOW):
            yield document.subset, document.index, tokens[start : start + WINDOW + 1]


def measure_text(
    net: PreTrainedModel, pieces: list[tuple[str, int, list[int]]], unigram: NDArray[np.float64]
) -> tuple[dict[str, Any], RoutingTrace]:
    """Loss and unigram loss of every subset, and the routing of every token."""
    totals: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(3))
    routed, sequences = [], []
    with RoutingRecorder(net) as recorder, torch.inference_mode():
        for start in range(0, len(pieces), ROWS):
            part = pieces[start : start + ROWS]
            tokens = torch.full((len(part), WINDOW + 1), -100)
            for row, (_, _, window) in enumerate(part):
                tokens[row, : len(window)] = torch.tensor(window)
            targets = tokens[:, 1:]
            logits = net(tokens[:, :-1].clamp(min=0)).logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()
            for row, (subset, _, window) in enumerate(part):
                count = len(window) - 1
                plain = unigram[window[1:]].sum()
                totals[subset] += (losses[row, :count].sum().item(), plain, count)
            real = (targets >= 0).flatten()
            routed.append(recorder.take()[0].expert_ids[real])
            sequences += [np.full(len(window) - 1, index) for _, index, window in part]
    trace = RoutingTrace(
        expert_ids=torch.cat(routed).numpy(),
        sequence_ids=np.concatenate(sequences).astype(np.int32),
        num_experts=recorder.num_experts,
        model=Path(net.name_or_path).name,
        layer_ids=recorder.layer_ids,
        phase="teacher-forced",
    )
    rows = dict(sorted(totals.items())) | {"all": sum(totals.values())}
    return {
        subset: {"loss": total[0] / total[2], "unigram": total[1] / total[2], "tokens": total[2]}
        for subset, total in rows.items()
    }, trace


def measure_placement(trace: RoutingTrace, ranks: int) -> dict[str, Any]:
    """Rows of linear and affinity placement, fitted and measured on different sequences."""
    topology = Topology(num_nodes=1, ranks_per_node=ranks)
    rows = compare_strategies(trace, topology, ["linear", "affinity"], slots_per_rank=None,
                              options=PlacementOptions())  # fmt: skip
    home, linear, affinity = rows
    total = [row["rows_per_token"]["total"] for row in (home, linear, affinity)]
    return {
        "rows_linear_home": total[0],
        "rows_linear_coherent": total[1],
        "rows_affinity_coherent": total[2],
        "reduction": 1 - total[2] / total[0],
        "crossing_linear": linear["crossing_rate"],
        "crossing_affinity": affinity["crossing_rate"],
        "imbalance": affinity["imbalance"],
    }


def agreement(folder: Path, net: PreTrainedModel, heldout: NDArray[np.uint16]) -> dict[str, float]:
    """The loss of the same windows by transformers, in two precisions, and by the training code."""
    starts = np.linspace(0, len(heldout) - WINDOW - 2, 32).astype(int)
    rows = torch.from_numpy(heldout[starts[:, None] + np.arange(WINDOW + 1)].astype(np.int64))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    low = load_model(str(folder), dtype="bfloat16", device="cpu")
    with torch.inference_mode():
        losses = [
            F.cross_entropy(m(inputs).logits.float().flatten(0, 1), targets.flatten()).item()
            for m in (net, low)
        ]
    shape = PRESETS[folder.name.rpartition("-")[2]]
    params = from_state(net.state_dict(), shape.num_layers)
    scratch = {name: torch.zeros_like(value) for name, value in params.items()}
    batch = Batch(tokens_BS=inputs, targets_BS=targets, balance=0.0,
                  load_LE=torch.zeros(shape.num_layers, shape.num_experts))  # fmt: skip
    engine = kernels if kernels.is_available() else model
    own, _ = engine.forward_backward(params, scratch, batch, shape)
    return {"transformers_float32": losses[0], "transformers_bfloat16": losses[1], "training": own}


def from_state(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The training code's parameters from a transformers state; the inverse of `state_dict`."""
    params = {"embed": state["model.embed_tokens.weight"], "final_norm": state["model.norm.weight"]}
    for i in range(num_layers):
        layer = {
            name.removeprefix(f"model.layers.{i}."): value
            for name, value in state.items()
            if name.startswith(f"model.layers.{i}.")
        }
        heads = [layer[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        params |= {
            f"{i}.attention_norm": layer["input_layernorm.weight"],
            f"{i}.qkv": torch.cat(heads),
            f"{i}.q_norm": layer["self_attn.q_norm.weight"],
            f"{i}.k_norm": layer["self_attn.k_norm.weight"],
            f"{i}.out": layer["self_attn.o_proj.weight"],
            f"{i}.expert_norm": layer["post_attention_layernorm.weight"],
            f"{i}.router": layer["mlp.gate.weight"],
            f"{i}.gate_up": layer["mlp.experts.gate_up_proj"],
            f"{i}.down": layer["mlp.experts.down_proj"],
        }
    return {name: value.float().contiguous() for name, value in params.items()}


def measure_speed(preset: str, repeats: int) -> dict[str, float]:
    """Tokens a second of one core's processor time, forward and backward, best of `repeats`."""
    shape = PRESETS[preset]
    params = init_parameters(shape, seed=0, router_std=0.1)
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    rows = torch.randint(shape.vocab_size, (ROWS, WINDOW + 1))
    load_LE = torch.full((shape.num_layers, shape.num_experts), 1 / shape.num_experts)
    batch = Batch(tokens_BS=rows[:, :-1], targets_BS=rows[:, 1:], load_LE=load_LE, balance=0.01)
    speeds = {}
    for name, engine in (("torch", model), ("kernels", kernels)):
        seconds = []
        for _ in range(repeats):
            began = time.process_time()
            engine.forward_backward(params, grads, batch, shape)
            seconds.append(time.process_time() - began)
        speeds[name] = ROWS * WINDOW / min(seconds)
    return speeds


def read_curve(path: Path) -> dict[str, list[float]]:
    """Columns of a CSV file; where a run was resumed the rows written last count."""
    with path.open(newline="") as file:
        rows = {int(row["tokens"]): row for row in csv.DictReader(file)}
    ordered = [rows[tokens] for tokens in sorted(rows)]
    return {name: [float(row[name]) for row in ordered] for name in ordered[0]}


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model, on one core."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    net = load_model(str(folder), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(str(folder))
    counts = np.bincount(np.load(args.runs / "data/train.npy"), minlength=len(tokenizer)) + 1
    unigram = -np.log(counts / counts.sum())
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in net.parameters())}
    figures["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    for name in ("heldout", "ood"):
        limit = args.ood_limit if name == "ood" else None
        pieces = list(windows(args.corpus / f"{name}.jsonl.zst", tokenizer, limit))
        figures[name], trace = measure_text(net, pieces, unigram)
        if name == "heldout":
            routing = describe(trace)
            figures["skew"] = routing["load_skew"]
            figures["information"] = routing["mutual_information"]
            part = trace.select(trace.sequence_ids % PLACED == 0)
            figures["placement"] = {str(r): measure_placement(part, r) for r in (2, 4, 8)}
    figures["agreement"] = agreement(folder, net, np.load(args.runs / "data/heldout.npy"))
    run = args.runs / folder.name
    curve = read_curve(run / "curve.csv")
    figures["training"] = {"tokens": int(curve["tokens"][-1]), "curve": curve,
                           "heldout": read_curve(run / "heldout.csv")}  # fmt: skip
    figures["speed"] = measure_speed(folder.name.rpartition("-")[2], args.repeats)
    return figures


def main() -> None:
    """Measure, write the page and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("out/train"))
    parser.add_argument("--assets", type=Path, default=ROOT / "exflow/assets")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--ood-limit", type=int, default=50_000, help="tokens a subset (50000)")
    parser.add_argument("--repeats", type=int, default=40, help="of the speed measurement (40)")
    args = parser.parse_args()
    folders = sorted(args.assets.glob("pile-moe-*"))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        figures = list(pool.map(evaluate, folders, [args] * len(folders)))
    results = {folder.name: part for folder, part in zip(folders, figures, strict=True)}
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    draw(results, args.out / "figures")
    write_markdown(results, args.out / "reference-models.md", args.ood_limit)
    for figures in results.values():
        del figures["training"]["curve"], figures["training"]["heldout"]
    text = json.dumps(results, indent=1)
    (args.out / "reference-models.json").write_text(text + "\n")
    print(json.dumps({"written": "docs/benchmarks/reference-models.json"}))


if __name__ == "__main__":
    main()
