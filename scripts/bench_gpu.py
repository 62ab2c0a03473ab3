"""Decode on one GPU against its memory bandwidth, with and without CUDA graphs.

    python scripts/bench_gpu.py --shape mixtral --layers 8 --batch 1 8 64
    python scripts/bench_gpu.py --kernels

Makes a checkpoint with random weights of a real model's layer shape (--layers of them, at least 20 GB
by default), decodes it with exflow and with transformers, and says what share of the memory bandwidth
each reached: the bytes a step must read (dense weights, the experts that its tokens use, keys and
values) over its time and the bandwidth that copying within the GPU reaches, and that the card is sold
with. --kernels compares the two ways through experts instead. Experts used are taken from a run that records routing. A step is the median of all after the
first tenth, prompts not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exflow.models.checkpoint import Checkpoint  # noqa: E402
from exflow.models.families import define_model  # noqa: E402
from exflow.runtime.decoder import Decoder  # noqa: E402
from exflow.runtime.engine import Engine, EngineOptions  # noqa: E402
from exflow.runtime.ranks import Ranks  # noqa: E402
from exflow.runtime.recorder import DecodeRecorder  # noqa: E402
from exflow.runtime.requests import Request, SamplingParams  # noqa: E402
from exflow.runtime.weights import load_weights  # noqa: E402
from placement.plan import PlacementPlan, Strategy  # noqa: E402
from placement.topology import Topology  # noqa: E402

GPU = torch.device("cuda")
LAYERS = {"mixtral": 8, "qwen3": 18}
# Sold bandwidth in bytes a second, by the card's name.
SOLD = {"H100 80GB HBM3": 3.35e12, "H100 PCIe": 2.0e12, "H200": 4.8e12, "A100-SXM4-80GB": 2.04e12}


def main() -> None:
    """Make the model, measure all, print the JSON; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=LAYERS, default="mixtral")
    add("--layers", type=int, help="default: as many as make 20 GB")
    add("--batch", type=int, nargs="+", default=[1, 8, 64])
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=64)
    add("--no-transformers", action="store_true")
    add("--kernels", action="store_true", help="time both ways through experts, nothing else")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device; bench_decode.py is for CPUs")
    if asked.kernels:
        print(json.dumps(compare_kernels()))
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        print(json.dumps(measure(folder, asked)))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """All batch sizes, all ways."""
    layers = asked.layers or LAYERS[asked.shape]
    start = time.perf_counter()
    model = make_model(asked.shape, layers)
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * 2
    say(f"{asked.shape} shape, {layers} layers, {num_bytes / 1e9:.1f} GB, {took(start)}")
    prompts = make_prompts(max(asked.batch), asked.prompt_tokens, model.config.vocab_size)
    theirs = {}
    if not asked.no_transformers:
        for batch in asked.batch:
            theirs[batch] = time_transformers(model, prompts[:batch], asked.new_tokens)
            say(f"transformers, batch {batch}: {1e3 * theirs[batch]:.2f} ms a step, {took(start)}")
    model.save_pretrained(folder, max_shard_size="5GB")
    del model
    torch.cuda.empty_cache()
    say(f"saved, {took(start)}")
    definition, weights = load(folder)
    say(f"loaded, {took(start)}")
    copied, sold = copy_bandwidth(), sold_bandwidth()
    rows = []
    for batch in asked.batch:
        used = experts_used(definition, weights, prompts[:batch], asked.new_tokens)
        context = batch * (asked.prompt_tokens + asked.new_tokens / 2)
        needed = step_bytes(definition, weights, used, context)
        row: dict[str, Any] = {"batch": batch, "experts_a_layer": used, "gb_a_step": needed / 1e9}
        if batch in theirs:
            row["transformers_ms"] = 1e3 * theirs[batch]
        for name, has_graphs in (("eager", False), ("graphs", True)):
            seconds = time_engine(
                definition, weights, prompts[:batch], asked.new_tokens, has_graphs=has_graphs
            )
            row[f"{name}_ms"] = 1e3 * seconds
            row[f"{name}_of_copied"] = needed / seconds / copied
            if sold is not None:
                row[f"{name}_of_sold"] = needed / seconds / sold
        row["tokens_s"] = 1e3 * batch / row["graphs_ms"]
        say(f"{json.dumps({key: round(value, 3) for key, value in row.items()})}, {took(start)}")
        rows.append(row)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": asked.shape,
        "layers": layers,
        "gb": num_bytes / 1e9,
        "prompt_tokens": asked.prompt_tokens,
        "new_tokens": asked.new_tokens,
        "copied_tb_s": copied / 1e12,
        "sold_tb_s": None if sold is None else sold / 1e12,
        "rows": rows,
    }


def make_model(shape: str, layers: int) -> Any:
    """A model of transformers with random weights, in bfloat16 on the GPU."""
    from transformers import (
        AutoModelForCausalLM,
        MixtralConfig,
        Qwen3MoeConfig,
    )

    config: Any
    if shape == "mixtral":  # Mixtral-8x7B but for the number of layers
        config = MixtralConfig(num_hidden_layers=layers)
    else:  # Qwen3-30B-A3B but for the number of layers
        config = Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    config.eos_token_id = None
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, vocab_size, length).tolist() for _ in range(count)]


@torch.inference_mode()
def time_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds of a decode step of `generate`: two lengths apart, so that the prompt is not counted."""
    ids = torch.tensor(prompts, device=GPU)
    mask = torch.ones_like(ids)

    def generate(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    generate(4)
    short, long = generate(4), generate(4 + new_tokens // 2)
    return (long - short) / (new_tokens // 2)


def load(folder: Path) -> tuple[Any, Any]:
    """The definition and all weights, as `exflow run` on one rank loads them."""
    definition = define_model(folder)
    every = [list(range(definition.num_experts))] * len(definition.moe_layer_ids)
    weights = load_weights(Checkpoint(folder), definition, every, dtype=torch.bfloat16, device=GPU)
    return definition, weights


def make_engine(
    definition: Any,
    weights: Any,
    batch: int,
    recorder: DecodeRecorder | None = None,
    *,
    has_graphs: bool = True,
) -> Engine:
    """An engine on one rank."""
    layers = len(definition.moe_layer_ids)
    plan = PlacementPlan.from_rank_of_expert(
        np.zeros((layers, definition.num_experts), dtype=np.int64),
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=1, ranks_per_node=1),
        strategy=Strategy(name="linear"),
    )
    options = EngineOptions(batch_size=batch, cuda_graphs=has_graphs)
    return Engine(Decoder(definition, weights), plan, Ranks(), options=options, recorder=recorder)


def time_engine(
    definition: Any, weights: Any, prompts: list[list[int]], new_tokens: int, *, has_graphs: bool
) -> float:
    """Median seconds of a decode step, recorded ones if there are graphs."""
    engine = make_engine(definition, weights, len(prompts), has_graphs=has_graphs)
    times: list[float] = []
    for _ in range(2):  # what is recorded in the first run serves in the second
        times.clear()
        decode_all(engine, prompts, new_tokens, times)
    steps = np.diff(times)
    return float(statistics.median(steps[len(steps) // 10 :]))


def decode_all(
    engine: Engine, prompts: list[list[int]], new_tokens: int, times: list[float] | None = None
) -> None:
    """Decode, and keep when each step's last token came."""
    requests = [
        Request(index=index, id=index, prompt="", token_ids=tuple(prompt))
        for index, prompt in enumerate(prompts)
    ]

    def note(token: Any) -> None:
        if times is not None and token.request.index == len(prompts) - 1:
            times.append(time.perf_counter())

    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    for _ in engine.generate(requests, params, on_token=note):
        pass


def experts_used(definition: Any, weights: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Different experts a step uses at a layer, on average."""
    recorder = DecodeRecorder(definition)
    engine = make_engine(definition, weights, len(prompts), recorder)
    decode_all(engine, prompts, new_tokens)
    trace = recorder.gather(Ranks(), GPU, source="bench", foretell=engine.foretell)
    by_step = trace.expert_ids.astype(np.int64)
    step_of_token = trace.positions
    counts = [
        len(np.unique(by_step[step_of_token == step][:, layer]))
        for step in np.unique(step_of_token)
        for layer in range(by_step.shape[1])
    ]
    return float(np.mean(counts))


def step_bytes(definition: Any, weights: Any, used: float, context: float) -> float:
    """Bytes that a decode step must read: weights but unused experts, and keys and values."""
    total = 0.0
    for layer in weights.layers:
        experts = layer.experts
        total += used * sum(
            part[0].numel() * part.element_size() for part in (experts.gate_up, experts.down)
        )
        attention = layer.attention
        total += sum(
            part.numel() * part.element_size()
            for part in (attention.qkv, attention.output, layer.router.weight)
        )
    total += weights.head.numel() * weights.head.element_size()
    return total + context * definition.num_layers * definition.kv_width * 2


# Experts, hidden size, width and experts a token.
SHAPES = {
    "Mixtral-8x7B": (8, 4096, 14336, 2),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "DeepSeek-V2-Lite": (64, 2048, 1408, 6),
}


@torch.inference_mode()
def compare_kernels() -> list[dict[str, Any]]:
    """Microseconds of one layer's experts by pairs and by grouped products, as rows grow."""
    from exflow.runtime.expert_weights import ExpertWeights
    from exflow.runtime.experts import run_chosen
    from exflow.runtime.gpu_kernels import run_pairs

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=GPU, dtype=torch.bfloat16) / sizes[-1] ** 0.5

    found = []
    for name, (num_experts, hidden, width, top_k) in SHAPES.items():
        experts = ExpertWeights(
            gate_up=normal(num_experts, 2 * width, hidden).transpose(1, 2),
            down=normal(num_experts, width, hidden),
        )
        for rows in (1, 2, 4, 8, 16, 32, 64):
            slots = torch.rand(rows, num_experts, device=GPU).argsort(dim=1)[:, :top_k]
            given = experts, normal(rows, hidden), slots, torch.rand(rows, top_k, device=GPU)
            used = len(slots.unique())
            row = {"shape": name, "rows": rows, "pairs": slots.numel(), "experts": used}
            for way in (run_pairs, run_chosen):
                row[f"{way.__name__}_us"] = microseconds(lambda way=way, given=given: way(*given))
            say(json.dumps(row))
            found.append(row)
    return found


def microseconds(work: Any) -> float:
    """Of work in a CUDA graph, five times over."""
    for _ in range(2):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / 50


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the GPU."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * source.numel() / (start.elapsed_time(end) / 1e3)


def sold_bandwidth() -> float | None:
    """What the card is sold with, if we know it."""
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in SOLD.items() if part in name), None)


def took(start: float) -> str:
    """Seconds since."""
    return f"{time.perf_counter() - start:.0f} s"


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
