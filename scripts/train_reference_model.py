r"""Train a small Mixture-of-Experts language model on a Pile-format corpus.

The presets `top1` and `top4` are the reference models in `exflow/assets`. The run is resumable: start
it again with the same --out and it goes on from its last checkpoint (one every three minutes, and one
when it is sent SIGTERM). At the end the model is exported to OUT/model for transformers.

    python scripts/train_reference_model.py --preset top1 --corpus CORPUS/train.jsonl.zst \
        --heldout CORPUS/heldout.jsonl.zst --out out/train/pile-moe-top1

On a CPU with AVX-512 the kernels of reference_model/kernels.cpp are used, on one thread: run the two
presets side by side. Anywhere else, and on a GPU, plain PyTorch computes the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from reference_model import kernels, model
from reference_model.data import Batches, prepare
from reference_model.export import export
from reference_model.model import Batch, ModelShape, init_parameters
from reference_model.optimizer import Optimizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRESETS = {
    "top1": ModelShape(num_experts=16, top_k=1, expert_width=64),
    "top4": ModelShape(num_experts=32, top_k=4, expert_width=32),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, required=True, help="the model's shape")
    add("--corpus", nargs="+", required=True, help="Pile-format shards, folders or patterns")
    add("--heldout", nargs="+", required=True, help="the same, for the held-out loss")
    add("--out", type=Path, required=True, help="checkpoint, curves and exported model")
    add("--data", type=Path, help="tokenizer and tokens, made if missing (OUT/../data)")
    add("--tokens", type=float, default=50e6, help="tokens to train on (50e6)")
    add("--batch", type=int, default=16384, help="tokens in a step (16384)")
    add("--micro", type=int, default=4096, help="tokens in a micro-batch (4096)")
    add("--lr", type=float, default=4e-3, help="peak learning rate (0.004)")
    add("--warmup", type=float, default=5e5, help="tokens until the peak (5e5)")
    add("--decay", type=float, default=0.3, help="last share of tokens, falling to 0 (0.3)")
    add("--balance", type=float, nargs=2, default=(0.02, 0.005),
        help="coefficient of the balancing loss, at the start and from half-way (0.02 0.005)")  # fmt: skip
    add("--router-std", type=float, default=0.1, help="initial scale of the router (0.1)")
    add("--short", type=int, default=128, help="sequence length at first (128)")
    add("--short-share", type=float, default=0.6, help="share of tokens in short sequences (0.6)")
    add("--seed", type=int, default=0)
    add("--save-every", type=float, default=180, help="seconds between checkpoints (180)")
    add("--engine", choices=("kernels", "torch"), help="kernels where they run, else torch")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.data = args.data or args.out.parent / "data"
    usable = args.device == "cpu" and kernels.is_available()
    args.engine = args.engine or ("kernels" if usable else "torch")
    return args


def learning_rate(tokens: int, args: argparse.Namespace) -> float:
    """Warm-up, a plateau, and a straight line to zero."""
    left = max(0.0, (args.tokens - tokens) / (args.tokens * args.decay))
    return args.lr * min(1.0, (tokens + 1) / args.warmup, left)


def balance_coefficient(tokens: int, args: argparse.Namespace) -> float:
    """Geometric from the first value to the second, which holds from half-way on."""
    share = min(1.0, tokens / (0.5 * args.tokens))
    return args.balance[0] ** (1 - share) * args.balance[1] ** share


class Run:
    """A training run: parameters, optimizer and position, saved and restored as one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.shape = args, PRESETS[args.preset]
        args.out.mkdir(parents=True, exist_ok=True)
        layers, E = self.shape.num_layers, self.shape.num_experts
        params = init_parameters(self.shape, seed=args.seed, router_std=args.router_std)
        self.params = {name: value.to(args.device) for name, value in params.items()}
        self.optimizer = Optimizer(self.params, self.shape.head_width)
        self.load_LE = torch.full((layers, E), 1 / E, device=args.device)
        self.meta = {"tokens": 0, "step": 0, "epoch": 0, "start": 0, "length": 0, "seconds": 0.0}
        self.grads = {name: torch.zeros_like(value) for name, value in self.params.items()}
        engine = kernels if args.engine == "kernels" else model
        self.compute = partial(engine.forward_backward, shape=self.shape)
        if self.checkpoint.exists():
            self.restore()

    @property
    def checkpoint(self) -> Path:
        """The file that holds the run."""
        return self.args.out / "checkpoint.safetensors"

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds."""
        params = {f"params/{name}": value for name, value in self.params.items()}
        state = {f"state/{name}": value for name, value in self.optimizer.state.items()}
        return params | state | {"load/load": self.load_LE}

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        with safe_open(self.checkpoint, "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])
            for name, value in self.tensors().items():
                value.copy_(file.get_tensor(name))
        for name in ("curve.csv", "heldout.csv"):
            forget_after(self.args.out / name, self.meta["tokens"])

    def save(self) -> None:
        """Write a checkpoint in one piece."""
        building = self.checkpoint.with_suffix(".tmp")
        save_file(self.tensors(), building, {"meta": json.dumps(self.meta)})
        building.replace(self.checkpoint)

    def length(self) -> int:
        """Sequence length at this point; a change starts another epoch."""
        short = self.meta["tokens"] < self.args.short_share * self.args.tokens
        length = self.args.short if short else self.shape.sequence_length
        if self.meta["length"] != length:
            epoch = self.meta["epoch"] + (self.meta["length"] > 0)
            self.meta |= {"epoch": epoch, "start": 0, "length": length}
        return length

    def step(self, batches: Batches) -> float:
        """One optimizer step; returns the mean loss."""
        meta, args, length = self.meta, self.args, self.length()
        loss, counts_LE, micro_steps = 0.0, 0, args.batch // args.micro
        for _ in range(micro_steps):
            rows, (meta["epoch"], meta["start"]) = batches.take(
                meta["epoch"], meta["start"], rows=args.micro // length, length=length
            )
            rows = rows.to(args.device)
            batch = Batch(
                tokens_BS=rows[:, :-1],
                targets_BS=rows[:, 1:],
                load_LE=self.load_LE,
                balance=balance_coefficient(meta["tokens"], args),
                scale=1 / micro_steps,
            )
            part, counts = self.compute(self.params, self.grads, batch)
            loss, counts_LE = loss + part / micro_steps, counts_LE + counts
        self.load_LE.lerp_(counts_LE / counts_LE.sum(-1, keepdim=True), 0.1)
        meta["step"] += 1
        lr = learning_rate(meta["tokens"], args)
        self.optimizer.step(self.grads, lr=lr, step=meta["step"])
        torch._foreach_zero_(list(self.grads.values()))
        meta["tokens"] += args.batch
        return loss

    def evaluate(self, tokens: NDArray[np.uint16], windows: int = 256) -> tuple[float, list[float]]:
        """Held-out loss on a sample of windows, and the load's max / mean in every layer."""
        S = self.shape.sequence_length
        starts = np.linspace(0, len(tokens) - S - 2, windows).astype(int)
        scratch = {name: torch.zeros_like(value) for name, value in self.params.items()}
        loss, counts_LE = 0.0, 0
        for part in starts.reshape(-1, 16):
            rows = torch.from_numpy(tokens[part[:, None] + np.arange(S + 1)].astype(np.int64))
            rows = rows.to(self.args.device)
            batch = Batch(
                tokens_BS=rows[:, :-1], targets_BS=rows[:, 1:], load_LE=self.load_LE, balance=0.0
            )
            mean, counts = self.compute(self.params, scratch, batch)
            loss, counts_LE = loss + mean * len(part) / windows, counts_LE + counts
        return loss, (counts_LE.amax(-1) / counts_LE.float().mean(-1)).tolist()


def forget_after(path: Path, tokens: int) -> None:
    """Drop the rows of a curve that a resumed run will write again."""
    if path.exists():
        header, *lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if int(line.partition(",")[0]) <= tokens]
        path.write_text("".join([header, *kept]))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(row)
        writer.writerow(round(v, 6) if isinstance(v, float) else v for v in row.values())


def train(run: Run, batches: Batches, heldout: NDArray[np.uint16]) -> bool:
    """Train to the end or until SIGTERM; whether the end was reached."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    meta, args, window = run.meta, run.args, []
    saved = time.monotonic()
    bar = tqdm(total=int(args.tokens), initial=meta["tokens"], unit="tok", unit_scale=True,
               mininterval=10)  # fmt: skip
    while meta["tokens"] < args.tokens and not stop:
        began = time.monotonic()
        window.append(run.step(batches))
        meta["seconds"] += time.monotonic() - began
        bar.update(args.batch)
        done = meta["tokens"] >= args.tokens
        if meta["step"] % 10 == 0 or done:
            skew = (run.load_LE * run.shape.num_experts).amax(-1).mean().item()
            loss = sum(window) / len(window)
            bar.set_postfix(loss=f"{loss:.3f}", skew=f"{skew:.2f}")
            row = {"tokens": meta["tokens"], "loss": loss, "seconds": meta["seconds"], "skew": skew}
            append(args.out / "curve.csv", row)
            window = []
        if meta["step"] % 125 == 0 or done:
            loss, skews = run.evaluate(heldout)
            row = {f"skew_{layer}": skew for layer, skew in enumerate(skews)}
            append(args.out / "heldout.csv", {"tokens": meta["tokens"], "loss": loss} | row)
        if time.monotonic() - saved > args.save_every or done or stop:
            run.save()
            saved = time.monotonic()
    return not stop


def main() -> None:
    """Train and export."""
    args = parse_arguments()
    torch.set_num_threads(1)
    shape = PRESETS[args.preset]
    prepare(args.corpus, args.heldout, args.data, shape.vocab_size)
    run = Run(args)
    print(f"{args.preset}: {args.engine} on {args.device}, {run.meta['tokens']} tokens done",
          file=sys.stderr)  # fmt: skip
    batches = Batches(np.load(args.data / "train.npy", mmap_mode="r"), args.seed)
    if train(run, batches, np.load(args.data / "heldout.npy")):
        params = {name: value.cpu() for name, value in run.params.items()}
        export(params, shape, args.data / "tokenizer.json", args.out / "model")
        print(json.dumps({"model": str(args.out / "model"), **run.meta}))


if __name__ == "__main__":
    main()
