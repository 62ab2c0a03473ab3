"""The kernels for little work on a CPU make what PyTorch's path makes."""

import pytest
import torch

from exflow.models.definition import DecoderDefinition
from exflow.models.parts import Activation, FullAttention, LatentAttention, Rope, Router
from exflow.runtime import attention, cpu_kernels, experts, norms, projections, router
from exflow.runtime.attention import DecodeAttention, Rotary
from exflow.runtime.attention_weights import FullWeights
from exflow.runtime.cpu_kernels import LITTLE, is_little
from exflow.runtime.expert_weights import ExpertWeights
from exflow.runtime.experts import run_experts
from exflow.runtime.kv_cache import PAGE_SIZE, KvCache
from exflow.runtime.norms import NormWeights, normalize
from exflow.runtime.projections import project
from exflow.runtime.router import route
from exflow.runtime.weights import RouterWeights

CPU = torch.device("cpu")
WITH_KERNELS = (attention, experts, norms, projections, router)
ROPE = Rope(frequencies=tuple(2.0**-i for i in range(4)), scaling=1.1)
FULL = FullAttention(num_heads=6, num_kv_heads=2, head_dim=8)
LATENT = LatentAttention(
    num_heads=3,
    query_rank=None,
    latent_rank=10,
    nope_dim=4,
    rope_dim=8,
    value_dim=5,
    scale=0.3,
    norm_eps=1e-6,
    has_bias=False,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def both_ways(monkeypatch):
    """A function's result by kernels, and by PyTorch."""

    def both(function):
        ours = function()
        for module in WITH_KERNELS:
            monkeypatch.setattr(module, "is_little", lambda *_: False)
        theirs = function()
        monkeypatch.undo()
        return ours, theirs

    return both


def define(heads, windows=(None, None)):
    return DecoderDefinition(
        name="tiny",
        family="tiny",
        vocab_size=8,
        hidden_size=12,
        num_layers=2,
        norm_eps=1e-6,
        max_positions=64,
        rope=ROPE,
        attention=heads,
        windows=windows,
        moe_layer_ids=(0, 1),
        num_experts=4,
        top_k=1,
        router=Router(),
        expert_size=4,
        dense_size=4,
        tie_word_embeddings=True,
        eos_token_ids=(0,),
        bos_token_id=None,
    )


def test_only_little_work_in_float32_on_a_cpu_is_for_kernels():
    rows = torch.zeros(2, 2)
    assert is_little(rows, LITTLE)
    assert not is_little(rows, LITTLE + 1)
    assert not is_little(rows.bfloat16(), 1)
    assert not is_little(rows.to("meta"), 1)


@pytest.mark.parametrize(
    "rows", [torch.randn(5, 19), torch.randn(4, 40)[:, 3:30], torch.zeros(0, 7)]
)
def test_rms_norm(rows, both_ways):
    norm = NormWeights(weight=torch.rand(rows.shape[1]), bias=None, eps=1e-3)
    ours, theirs = both_ways(lambda: normalize(rows, norm))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("qk_norm", ["none", "head", "projection"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_queries_and_cache_entries(qk_norm, clip, num_tokens, both_ways):
    heads = FullAttention(num_heads=6, num_kv_heads=2, head_dim=8, qk_norm=qk_norm, clip_qkv=clip)
    shapes = {"none": [], "head": [(8, 8)], "projection": [(48,), (16,)]}[qk_norm]
    weights = FullWeights(
        qkv=torch.randn(12, 80),
        qkv_bias=None,
        qk_norms=tuple(
            NormWeights(weight=torch.rand(shape), bias=None, eps=1e-6) for shape in shapes
        ),
        sinks=None,
        output=torch.randn(48, 12),
        output_bias=None,
    )
    rows = torch.randn(num_tokens, 12)
    rotation = Rotary(define(heads), dtype=torch.float32, device=CPU).at(torch.arange(num_tokens))
    ours, theirs = both_ways(lambda: project(define(heads), weights, rows, rotation))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_experts_are_chosen_alike(is_normalized, top_k, both_ways):
    gate = Router(is_normalized=is_normalized, scale=1.5)
    weights = RouterWeights(weight=torch.randn(12, 7), bias=torch.randn(7), correction=None)
    rows = torch.randn(9, 12)
    ours, theirs = both_ways(lambda: route(gate, weights, rows, top_k))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [torch.randn(6, 12), torch.randn(6, 30)[:, 5:17]])
def test_experts_of_rows_and_none_where_none_is_here(rows, both_ways):
    weights = ExpertWeights(
        gate_up=torch.randn(4, 16, 12).transpose(1, 2), down=torch.randn(4, 8, 12)
    )
    slots = torch.tensor([[0, 3], [-1, 2], [-1, -1], [1, 0], [3, -1], [2, 1]])
    shares = torch.rand(6, 2)
    ours, theirs = both_ways(lambda: run_experts(weights, rows, slots, shares))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not ours[2].any()


def test_experts_with_biases_are_not_for_kernels(monkeypatch):
    monkeypatch.setattr(experts, "run_little", None)
    weights = ExpertWeights(
        gate_up=torch.randn(2, 12, 16),
        down=torch.randn(2, 8, 12),
        activation=Activation(has_bias=True),
        gate_up_bias=torch.randn(2, 16),
        down_bias=torch.randn(2, 12),
    )
    run_experts(weights, torch.randn(3, 12), torch.tensor([[0], [1], [0]]), torch.rand(3, 1))


@pytest.mark.parametrize("heads", [FULL, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("window", [None, 1, 7, PAGE_SIZE + 1])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("slots", [[0], [2, 0, 1]])
def test_attention_over_pages(heads, window, has_sinks, slots, both_ways):
    definition = define(heads, windows=(None, window))
    positions = torch.tensor([3, 2 * PAGE_SIZE, PAGE_SIZE - 1])
    filled = torch.randn(2 * 9 * PAGE_SIZE, definition.kv_width)
    slots = torch.tensor(slots)
    queries = torch.randn(len(slots), heads.num_heads, heads.key_dim)
    entries = torch.randn(len(slots), definition.kv_width)
    sinks = torch.randn(heads.num_heads) if has_sinks else None

    def step():
        cache = KvCache(
            num_layers=2,
            num_pages=9,
            width=definition.kv_width,
            num_slots=3,
            pages_per_slot=3,
            dtype=torch.float32,
            device=CPU,
        )
        cache.entries.copy_(filled)
        for slot, pages in enumerate([[4], [0, 7, 2], [8]]):
            cache.assign(slot, pages)
        rotary = Rotary(definition, dtype=torch.float32, device=CPU)
        longest = int(positions.max())
        attend = DecodeAttention(
            definition, cache, rotary, positions_S=positions, longest=longest
        ).attend
        found = [attend(layer, slots, queries, entries, sinks_H=sinks) for layer in (0, 1)]
        return *found, cache.entries

    ours, theirs = both_ways(step)
    torch.testing.assert_close(ours, theirs)


def test_kernels_need_no_global_interpreter_lock_and_are_kept_on_disk():
    assert cpu_kernels.attend_pages.targetoptions["nogil"]
    assert cpu_kernels.attend_pages.stats.cache_path


def test_without_a_folder_for_its_cache_a_kernel_is_compiled_all_the_same(monkeypatch):
    def njit(signature, **options):
        if options.pop("cache", False):
            msg = "cannot cache function: no locator available"
            raise RuntimeError(msg)
        return lambda function: (function, signature)

    monkeypatch.setattr(cpu_kernels, "njit", njit)
    assert cpu_kernels.kernel("(i8)")(abs) == (abs, "(i8)")
