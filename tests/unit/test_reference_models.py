"""The reference models are what they are said to be, and the training kernels compute the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from exflow.assets import BUNDLED_MODELS, resolve_model
from exflow.profiling.checkpoint import load_model, load_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHAPES = {"pile-moe-top1": (16, 1), "pile-moe-top4": (32, 4)}
TEXT = "The result of the experiment was that the number of cells in the blood was"

pytestmark = pytest.mark.reference


@pytest.fixture(params=BUNDLED_MODELS, scope="module")
def folder(request):
    return Path(resolve_model(request.param))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def net(folder):
    return load_model(str(folder), dtype="float32", device="cpu")


def loss_of(net, tokenizer, text):
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
    with torch.inference_mode():
        return net(ids, labels=ids).loss.item()


def test_a_reference_model_has_eight_moe_layers_and_its_experts(folder):
    config = json.loads((folder / "config.json").read_text())
    experts, top_k = SHAPES[folder.name]
    assert config["model_type"] == "qwen3_moe"
    assert config["num_hidden_layers"] == 8
    assert config["mlp_only_layers"] == []
    assert config["decoder_sparse_step"] == 1
    assert config["num_local_experts"] == experts
    assert config["num_experts_per_tok"] == top_k
    assert config["norm_topk_prob"] is False
    assert config["num_key_value_heads"] == 1
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == 4096


def test_a_reference_model_takes_at_most_20_megabytes(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 20e6


def test_the_tokenizer_gives_back_any_text(tokenizer):
    text = "def f(x):\n\treturn x**2  # naïve 12345 \N{GREEK SMALL LETTER BETA}\r\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert max(ids) < 4096


def test_plain_english_is_far_more_likely_than_its_words_in_disorder(net, tokenizer):
    disorder = " ".join(sorted(TEXT.split(), key=lambda word: word[::-1]))
    assert loss_of(net, tokenizer, TEXT) < loss_of(net, tokenizer, disorder) - 1.0


def test_greedy_text_is_the_same_twice_and_made_of_words(net, tokenizer):
    ids = torch.tensor([[0, *tokenizer(TEXT)["input_ids"]]])
    first, second = (
        net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)
    words = tokenizer.decode(first[0, ids.shape[1] :]).split()
    assert len(words) >= 6
    assert len({"the", "of", "and", "in", "a", "to"} & set(words)) >= 2


def test_bfloat16_has_the_loss_of_float32(folder, net, tokenizer):
    half = load_model(str(folder), dtype="bfloat16", device="cpu")
    expected = loss_of(net, tokenizer, TEXT)
    assert loss_of(half, tokenizer, TEXT) == pytest.approx(expected, abs=0.1)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


@pytest.mark.parametrize("top_k", [1, 4])
def test_the_training_kernels_give_the_gradients_of_plain_pytorch(scripts, top_k):
    from reference_model import kernels, model

    if not kernels.is_available():
        pytest.skip("needs AVX-512 and g++")
    shape = model.ModelShape(
        num_experts=16, top_k=top_k, expert_width=32, num_layers=2, vocab_size=128
    )
    params = model.init_parameters(shape, seed=0, router_std=0.1)
    tokens = torch.randint(128, (3, 65), generator=torch.Generator().manual_seed(0))
    batch = model.Batch(
        tokens_BS=tokens[:, :-1],
        targets_BS=tokens[:, 1:],
        load_LE=torch.rand(2, 16),
        balance=0.1,
        scale=0.5,
    )
    results = []
    for engine in (model, kernels):
        grads = {name: torch.zeros_like(value) for name, value in params.items()}
        results.append((*engine.forward_backward(params, grads, batch, shape), grads))
    (loss, counts, grads), (kernel_loss, kernel_counts, kernel_grads) = results
    assert kernel_loss == pytest.approx(loss, rel=1e-5)
    assert torch.equal(kernel_counts, counts)
    for name, grad in grads.items():
        assert (kernel_grads[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_an_exported_model_computes_what_was_trained(scripts, tmp_path):
    from reference_model import export, model

    shape = model.ModelShape(
        num_experts=16, top_k=2, expert_width=16, num_layers=2, vocab_size=4096
    )
    params = model.init_parameters(shape, seed=0, router_std=0.1)
    params = {name: value.bfloat16().float() for name, value in params.items()}
    export.export(
        params, shape, Path(resolve_model("pile-moe-top1")) / "tokenizer.json", tmp_path / "model"
    )
    net = load_model(str(tmp_path / "model"), dtype="float32", device="cpu")
    tokens = torch.randint(4096, (2, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.inference_mode():
        logits = net(inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    batch = model.Batch(
        tokens_BS=inputs, targets_BS=targets, load_LE=torch.zeros(2, 16), balance=0.0
    )
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    own, _ = model.forward_backward(params, grads, batch, shape)
    assert own == pytest.approx(loss, abs=1e-5)
