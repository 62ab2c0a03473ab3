"""Figures and page of `evaluate_reference_model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Results = dict[str, dict[str, Any]]
COLOURS = {"pile-moe-top1": "#1f5fa8", "pile-moe-top4": "#c4541a"}

PAGE = """# The reference models

Two small Mixture-of-Experts language models come with ExFlow in [exflow/assets](../../exflow/assets), so that routing, placement
and distributed decode can be tried on real routing without a download. Both are Qwen3-MoE (`transformers` loads them
unchanged), trained from scratch on a Pile-format corpus of 59 MB (10 Pile-like subsets, 19.7 M tokens).

```bash
{commands}
```

The last command writes this page and [reference-models.json](reference-models.json), from the exported bfloat16 checkpoints
loaded with `transformers` and computed in float32: all of `heldout` (the same sites, other documents) and {limit} tokens of every
subset of `ood`, in windows of 256 tokens.

{shapes}

## Loss

Nats a token, next to a unigram model fitted on the training tokens. The last three subsets were not in the training corpus.

{losses}

![loss](figures/reference-models-loss.svg)

The same windows by `transformers` and by the training code, nats a token:

{agreement}

## Routing

On `heldout`. Load is max / mean over a layer's experts; information is the normalised mutual information of a token's first
experts at adjacent layers, with that of routing shuffled over tokens, and shuffled within each document, beside it.

{routing}

![routing](figures/reference-models-routing.svg)

Rows a token on R ranks of one node (dispatch and combine, all layers), for a quarter of the documents, plans fitted on half of
those and measured on the others; `home` is the token that returns after every layer, `coherent` the token that stays:

{placement}

## Speed

Tokens a second of one core's processor time, forward and backward of 4096 tokens in float32, best of 40; the processor
has AVX-512 and no AMX, and did other work at the same time. `torch` is plain PyTorch with automatic differentiation, `kernels` is
[kernels.cpp](../../scripts/reference_model/kernels.cpp), the same function with gradients equal to about 1e-6.

{speed}

{notes}
"""

COMMANDS = """for preset in top1 top4; do  # side by side, a core each
  python scripts/train_reference_model.py --preset $preset --corpus CORPUS/train.jsonl.zst \\
    --heldout CORPUS/heldout.jsonl.zst --out out/train/pile-moe-$preset &
done; wait
cp -r out/train/pile-moe-top1/model/. exflow/assets/pile-moe-top1
cp -r out/train/pile-moe-top4/model/. exflow/assets/pile-moe-top4
python scripts/evaluate_reference_model.py --corpus CORPUS --runs out/train"""

NOTES = """## How these two were made

Muon for the matrices and AdamW for the rest, batches of 16384 tokens, learning rate 0.004 with a straight fall to zero over the
last 30%, sequences of 128 tokens for the first 60% and of 256 after that. The load-balancing loss uses the load of the last
global batches, so experts may specialise by domain. The runs were stopped and resumed several times, on a machine shared with
other work (on average 9,800 and 9,000 tokens a second of wall time, about two thirds of a core each). Two things a fresh run would not repeat bit for bit: until about 9 M tokens plain PyTorch with `torch.compile`
computed part of what the kernels do now, and the final balancing coefficient of `pile-moe-top1` was 0.005 up to 33 M
tokens and 0.0025 after that (`--balance 0.02 0.0025`); `pile-moe-top4` has 0.005 throughout.
The held-out figure of the curves is on 256 windows spread over `heldout`; while sequences were short it measures positions
the model had not seen yet, hence the step at 30 M tokens."""


def table(head: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_markdown(results: Results, path: Path, limit: int) -> None:
    """Write the page."""
    page = PAGE.format(
        commands=COMMANDS,
        limit=limit,
        shapes=_shapes(results),
        losses=_losses(results),
        agreement=_agreement(results),
        routing=_routing(results),
        placement=_placement(results),
        speed=_speed(results),
        notes=NOTES,
    )
    path.write_text(page)


def _shapes(results: Results) -> str:
    rows: list[list[object]] = [
        [
            name,
            f"{r['parameters'] / 1e6:.2f} M",
            f"{r['bytes'] / 1e6:.1f} MB",
            f"{r['training']['tokens'] / 1e6:.1f} M",
        ]
        for name, r in results.items()
    ]
    return table(["model", "parameters", "files, with tokenizer", "tokens trained"], rows)


def _losses(results: Results) -> str:
    first = next(iter(results.values()))
    rows: list[list[object]] = []
    for part in ("heldout", "ood"):
        for subset, base in first[part].items():
            losses = [f"{r[part][subset]['loss']:.3f}" for r in results.values()]
            name = f"**{part}**" if subset == "all" else subset
            rows.append([name, int(base["tokens"]), f"{base['unigram']:.3f}", *losses])
    return table(["subset", "tokens", "unigram", *results], rows)


def _agreement(results: Results) -> str:
    head = ["model", "transformers, float32", "transformers, bfloat16", "training code, float32"]
    rows: list[list[object]] = [
        [name, *(f"{loss:.5f}" for loss in r["agreement"].values())] for name, r in results.items()
    ]
    return table(head, rows)


def _routing(results: Results) -> str:
    rows: list[list[object]] = []
    for name, r in results.items():
        info, skew = r["information"]["top1"], r["skew"]
        layers = " ".join(f"{value:.2f}" for value in skew["per_layer"])
        steps = " ".join(f"{value:.2f}" for value in info["per_layer"])
        nulls = f"{info['null']:.3f}, {info['null_within_sequence']:.3f}"
        rows.append([name, layers, f"{skew['max']:.2f}", steps, f"{info['mean']:.3f}", nulls])
    head = ["model", "load, by layer", "worst", "information, by step", "mean", "shuffled"]
    return table(head, rows)


def _placement(results: Results) -> str:
    rows: list[list[object]] = []
    for name, r in results.items():
        for ranks, p in r["placement"].items():
            rows.append(
                [
                    name,
                    ranks,
                    f"{p['rows_linear_home']:.2f}",
                    f"{p['rows_linear_coherent']:.2f}",
                    f"{p['rows_affinity_coherent']:.2f}",
                    f"{p['reduction']:.1%}",
                    f"{p['crossing_linear']:.3f} -> {p['crossing_affinity']:.3f}",
                ]
            )
    head = ["model", "R", "linear, home", "linear, coherent", "affinity, coherent",
            "fewer rows", "top-1 crossing rate, linear -> affinity"]  # fmt: skip
    return table(head, rows)


def _speed(results: Results) -> str:
    rows: list[list[object]] = []
    for name, r in results.items():
        plain, fast = r["speed"]["torch"], r["speed"]["kernels"]
        rows.append([name, f"{plain:,.0f}", f"{fast:,.0f}", f"{fast / plain:.1f}x"])
    return table(["shape", "torch", "kernels", ""], rows)


def draw(results: Results, folder: Path) -> None:
    """The loss curves, and load and information by layer."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "exflow", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False, "svg.fonttype": "none"})  # fmt: skip
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, r in results.items():
        curve, heldout = r["training"]["curve"], r["training"]["heldout"]
        tokens = [x / 1e6 for x in curve["tokens"]]
        axis.plot(tokens, curve["loss"], color=COLOURS[name], lw=0.6, alpha=0.5)
        tokens = [x / 1e6 for x in heldout["tokens"]]
        axis.plot(tokens, heldout["loss"], color=COLOURS[name], marker="o", ms=3, label=name)
    axis.set(xlabel="tokens (millions)", ylabel="loss (nats a token)", ylim=(3, 6))
    axis.legend(title="held-out (thin: training)", frameon=False)
    figure.savefig(folder / "reference-models-loss.svg", metadata={"Date": None})
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.8), layout="constrained")
    for shift, (name, r) in zip((-0.2, 0.2), results.items(), strict=False):
        skew, steps = r["skew"]["per_layer"], r["information"]["top1"]["per_layer"]
        left.bar([i + shift for i in range(len(skew))], skew, 0.38, color=COLOURS[name])
        right.bar(
            [i + shift for i in range(len(steps))], steps, 0.38, color=COLOURS[name], label=name
        )
    left.set(xlabel="layer", ylabel="load, max / mean", ylim=(1, None))
    right.set(xlabel="from layer to the next", ylabel="normalised mutual information")
    right.legend(frameon=False)
    figure.savefig(folder / "reference-models-routing.svg", metadata={"Date": None})
