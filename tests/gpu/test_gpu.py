"""The runtime on a GPU: its own kernels, CUDA graphs, NCCL, and ranks that share a GPU.

NCCL refuses two ranks on one GPU (before 2.30). Its calls are tested in a group of one rank, and several ranks by
gloo with tensors on the GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import exflow.runtime.graphs
from decoding import (
    check_logits,
    check_traffic,
    decode_all,
    keeping_logits,
    make_case,
    make_plan,
    save_model,
)
from exflow.models.checkpoint import Checkpoint
from exflow.runtime.coherent import CoherentDispatcher
from exflow.runtime.decoder import Decoder
from exflow.runtime.dispatcher import HomeDispatcher, LocalDispatcher, Tokens
from exflow.runtime.engine import Engine, EngineOptions
from exflow.runtime.expert_weights import ExpertWeights
from exflow.runtime.experts import run_chosen
from exflow.runtime.metrics import PhaseMetrics
from exflow.runtime.ranks import Ranks
from exflow.runtime.replicated import ReplicatedDispatcher
from exflow.runtime.requests import Request, SamplingParams
from exflow.runtime.rows import RowFormat
from exflow.runtime.tables import PlacementTables
from exflow.runtime.weights import load_weights
from exflow.runtime.wire import Wire
from harness import run_ranks
from tiny_checkpoints import FAMILIES, make_prompts, qwen3_moe, save_byte_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    save, changes = FAMILIES[request.param]
    return save_model(save, tmp_path_factory.mktemp("model"), **changes)


def test_every_family_gives_the_tokens_and_logits_of_transformers(model):
    """In float32, beside transformers on the CPU."""
    case = replace(make_case(make_plan(model.definition, 1, "linear")), device="cuda")
    result = decode_all(model, [case])[0]
    assert result.tokens == model.tokens
    check_logits(result.logits, model, error=1e-4)


LENGTHS = [5, 17, 1, 30, 8, 3, 9, 60, 2, 4]


def generate(model, dtype=torch.bfloat16):
    """Requests of mixed length that join and leave: tokens, logits, and steps recorded."""
    plan = make_plan(model.definition, 1, "linear")
    weights = load_weights(
        Checkpoint(model.folder),
        model.definition,
        [layer[0] for layer in plan.slots],
        dtype=dtype,
        device=GPU,
    )
    engine = Engine(
        Decoder(model.definition, weights), plan, Ranks(), options=EngineOptions(batch_size=6)
    )
    requests = [
        Request(index=i, id=i, prompt="", token_ids=tuple(prompt))
        for i, prompt in enumerate(make_prompts(LENGTHS))
    ]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    logits: dict = {}
    with keeping_logits(logits, torch.float32):
        tokens = {c.request.index: c.token_ids for c in engine.generate(requests, params)}
    return tokens, logits, engine._cached[1].num_recorded


def test_recorded_steps_are_the_steps(model, monkeypatch):
    """As far as their tokens are the same: in bfloat16 some are nearly as likely as others."""
    tokens, logits, num_recorded = generate(model)
    assert num_recorded > 1
    monkeypatch.setattr(exflow.runtime.graphs, "TIMES_EAGER", 1 << 30)
    expected_tokens, expected, num_recorded = generate(model)
    assert num_recorded == 0
    compared = 0
    for index, length in enumerate(LENGTHS):
        for step in range(40):
            ours, theirs = logits[index, length + step], expected[index, length + step]
            where = f"request {index}, token {step}"
            assert abs(ours - theirs).max() <= 0.03 * abs(theirs).max(), where
            compared += 1
            if tokens[index][step] != expected_tokens[index][step]:
                break
    assert compared > 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("slots", "hidden", "width", "rows", "top_k"),
    [(8, 4096, 14336, 1, 2), (128, 2048, 768, 4, 8), (5, 48, 40, 3, 2), (3, 104, 136, 1, 3)],
)
def test_few_rows_have_a_kernel(dtype, slots, hidden, width, rows, top_k):
    from exflow.runtime.gpu_kernels import run_pairs

    torch.manual_seed(0)
    gate_up = torch.randn(slots, 2 * width, hidden, device=GPU, dtype=dtype) / hidden**0.5
    down = torch.randn(slots, width, hidden, device=GPU, dtype=dtype) / width**0.5
    hidden_ND = torch.randn(rows, hidden, device=GPU, dtype=dtype)
    slots_NK = torch.randint(-1, slots, (rows, top_k), device=GPU)
    weights_NK = torch.rand(rows, top_k, device=GPU)
    found = run_pairs(
        ExpertWeights(gate_up=gate_up.transpose(1, 2), down=down), hidden_ND, slots_NK, weights_NK
    )
    expected = torch.zeros(rows, hidden, device=GPU, dtype=torch.float64)
    for row in range(rows):
        for choice in range(top_k):
            slot = int(slots_NK[row, choice])
            if slot >= 0:
                gate, up = (gate_up[slot].double() @ hidden_ND[row].double()).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                expected[row] += weights_NK[row, choice].double() * (inner @ down[slot].double())
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= error * expected.abs().max()


def test_kernel_and_grouped_products_agree_on_many_rows():
    from exflow.runtime.gpu_kernels import run_pairs

    torch.manual_seed(0)
    experts = ExpertWeights(
        gate_up=torch.randn(16, 256, 512, device=GPU, dtype=torch.bfloat16).transpose(1, 2) / 22,
        down=torch.randn(16, 128, 512, device=GPU, dtype=torch.bfloat16) / 11,
    )
    hidden_ND = torch.randn(50, 512, device=GPU, dtype=torch.bfloat16)
    slots_NK = torch.randint(-1, 16, (50, 4), device=GPU)
    weights_NK = torch.rand(50, 4, device=GPU)
    one, other = (
        run(experts, hidden_ND, slots_NK, weights_NK).float() for run in (run_pairs, run_chosen)
    )
    assert (one - other).abs().max() <= 2e-2 * other.abs().max()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_that_share_a_gpu(num_ranks, tmp_path):
    """By gloo, with tensors on the GPU: every protocol and dispatch."""
    model = save_model(qwen3_moe, tmp_path, num_experts_per_tok=3)
    plan = make_plan(model.definition, num_ranks, "copies")
    ways = [("home", "flat"), ("coherent", "flat"), ("home", "hierarchical")]
    ways += [("coherent", "hierarchical"), ("coherent", "replicated")]
    cases = []
    for protocol, dispatch in ways:
        case = make_case(plan, protocol)
        options = replace(case.options, dispatch=dispatch, share_bytes=1 << 10)
        cases.append(replace(case, options=options, device="cuda"))
    by_rank = run_ranks(num_ranks, decode_all, model, cases, timeout=280)
    for number, case in enumerate(cases):
        results = [found[number] for found in by_rank]
        assert all(result.tokens == model.tokens for result in results)
        if case.options.dispatch != "replicated":
            check_traffic(results[0], case)


def through_nccl(model):
    """A group of one rank: dispatch and combine by NCCL, and beside them a message in the background."""
    definition, plan = model.definition, make_plan(model.definition, 1, "linear")
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
        try:
            return _compare_dispatchers(definition, plan)
        finally:
            dist.destroy_process_group()


def _compare_dispatchers(definition, plan):
    tables = PlacementTables.from_plan(
        plan, 0, top_k=definition.top_k, coherence_domain=None, device=GPU
    )
    wire = Wire(Ranks(), GPU, PhaseMetrics(plan.num_layers, 1), has_background=True)
    wire.connect()

    def row_format(has_owner):
        return RowFormat(
            hidden_size=definition.hidden_size,
            top_k=definition.top_k,
            dtype=torch.bfloat16,
            has_owner=has_owner,
        )

    dispatchers = {
        "local": LocalDispatcher(tables=tables),
        "home": HomeDispatcher(tables=tables, format=row_format(False), wire=wire),
        "coherent": CoherentDispatcher(
            tables=tables, format=row_format(True), wire=wire, num_domains=1
        ),
        "replicated": ReplicatedDispatcher(tables=tables, wire=wire),
    }
    torch.manual_seed(0)
    tokens = Tokens(
        hidden=torch.randn(6, definition.hidden_size, device=GPU, dtype=torch.bfloat16),
        slots=torch.arange(6, device=GPU),
        owned=(6,),
    )
    expert_ids = torch.stack(
        [torch.randperm(definition.num_experts, device=GPU)[: definition.top_k] for _ in range(6)]
    )
    weights = torch.rand(6, definition.top_k, device=GPU)

    def pass_through(name):
        rows, record = dispatchers[name].dispatch(0, tokens, expert_ids, weights)
        scale = (rows.weights * (rows.expert_slots + 1)).sum(dim=1, keepdim=True)
        return dispatchers[name].combine((rows.hidden * scale).to(torch.bfloat16), record).hidden

    found = {name: pass_through(name).cpu() for name in dispatchers}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = pass_through("replicated")
    recorded.zero_()
    graph.replay()
    found["recorded"] = recorded.cpu()
    content = torch.arange(100, dtype=torch.uint8, device=GPU)
    found["background"] = wire.start_exchange(content, [100], [100]).wait().cpu()
    return found


def test_dispatch_by_nccl(tmp_path):
    model = save_model(qwen3_moe, tmp_path, num_experts_per_tok=3)
    found = run_ranks(1, through_nccl, model)[0]
    assert found.pop("background").tolist() == list(range(100))
    expected = found.pop("local")
    assert found.keys() == {"home", "coherent", "replicated", "recorded"}
    for name, hidden in found.items():
        assert torch.equal(hidden, expected), name


def run_exflow(*arguments, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, "-m", "exflow", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_main_job_on_a_gpu(tmp_path):
    """Profile, place, and decode on one rank and on two that share the GPU."""
    folder = tmp_path / "tiny"
    qwen3_moe(folder, vocab_size=256, num_hidden_layers=2)
    save_byte_tokenizer(folder)
    texts = [f"Number {number} of some texts. " * 9 for number in range(40)]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Books3"}}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Number {n}"}) + "\n" for n in range(5)))
    trace, plan = tmp_path / "trace.safetensors", tmp_path / "plan.json"
    run_exflow("profile", folder, tmp_path / "texts.jsonl", "-o", trace, "--device", "cuda")
    run_exflow("place", trace, "-o", plan, "--nodes", 1, "--ranks-per-node", 2)
    run = ["run", folder, "--prompts", prompts, "--max-new-tokens", 9, "--dtype", "float32"]
    run_exflow(*run, "-o", tmp_path / "cpu.jsonl", "--device", "cpu")
    run_exflow(*run, "-o", tmp_path / "gpu.jsonl", "--device", "cuda")
    metrics = tmp_path / "metrics.json"
    said = run_exflow(
        *run, "-o", tmp_path / "two.jsonl", "--plan", plan, "--metrics", metrics, ranks=2
    )
    if torch.cuda.device_count() == 1:
        assert "share a GPU" in said
    expected, *others = (
        {line["id"]: line for line in map(json.loads, (tmp_path / f"{name}.jsonl").open())}
        for name in ("cpu", "gpu", "two")
    )
    assert all(other == expected for other in others)
    assert json.loads(metrics.read_text())["measured_equals_predicted"] is True
