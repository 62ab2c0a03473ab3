"""LLM from Python, on one rank."""

import subprocess
import sys

import pytest
import torch

from exflow import LLM, SamplingParams, UserError
from tiny_checkpoints import qwen3_moe, save_byte_tokenizer

PROMPTS = ["One", "two and", "three, and a longer one", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    qwen3_moe(folder, vocab_size=256, num_hidden_layers=2)
    save_byte_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, batch_size=2) as llm:
        yield llm


def test_completions_come_in_the_order_of_the_prompts_with_their_own_parameters(llm):
    lengths = [9, 2, 5, 1]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    found = llm.generate(PROMPTS, params)
    assert [done.request.prompt for done in found] == PROMPTS
    assert [len(done.token_ids) for done in found] == lengths
    assert {done.finish_reason for done in found} == {"length"}
    assert [done.text for done in found] == [llm.tokenizer.decode(d.token_ids) for d in found]


def test_token_ids_are_prompts_too_and_one_text_is_one_prompt(llm):
    (text,) = llm.generate(PROMPTS[0])
    (ids,) = llm.generate([llm.tokenizer(PROMPTS[0])["input_ids"]])
    assert text.token_ids == ids.token_ids
    (tensor,) = llm.generate([torch.tensor(llm.tokenizer(PROMPTS[0])["input_ids"])])
    assert text.token_ids == tensor.token_ids
    assert ids.request.prompt == PROMPTS[0]


@pytest.mark.parametrize("prompt", ["\ud800", [5, 256], [-1], [0.5], 7])
def test_what_is_no_prompt_is_refused_by_its_number(llm, prompt):
    with pytest.raises(UserError, match="prompt 1 "):
        llm.generate(["One", prompt])


def test_mixed_parameters_give_what_each_gives_alone(llm):
    params = [
        SamplingParams(max_tokens=8),
        SamplingParams(max_tokens=8, temperature=1.0, seed=1),
        SamplingParams(max_tokens=8, temperature=0.7, top_p=0.8, top_k=20, seed=2),
        SamplingParams(max_tokens=8, temperature=1.5, seed=3),
    ]
    together = llm.generate(PROMPTS, params)
    for number, own in enumerate(params):
        assert llm.generate(PROMPTS, own)[number].token_ids == together[number].token_ids


def test_a_stop_string_ends_the_text_before_it(llm):
    params = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True}
    (full,) = llm.generate(PROMPTS[:1], SamplingParams(**params))
    stop = next(letter for letter in full.text[3:] if letter.isascii())
    (cut,) = llm.generate(PROMPTS[:1], SamplingParams(stop=stop, **params))
    assert cut.finish_reason == "stop"
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]


def test_tokens_are_streamed_as_they_are_made(llm):
    seen = {}

    def listen(token):
        seen.setdefault(token.request.index, []).append(token)

    found = llm.generate(PROMPTS, SamplingParams(max_tokens=6), on_token=listen)
    for index, done in enumerate(found):
        tokens = seen[index]
        assert tuple(token.token_id for token in tokens) == done.token_ids
        assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
        assert tokens[-1].finish_reason == done.finish_reason
        assert done.text.startswith("".join(token.text for token in tokens))


def test_a_request_that_never_fits_is_refused_and_the_others_go_on(folder):
    with LLM(folder, kv_cache_tokens=32) as llm:
        found = llm.generate(["a", "b" * 40, "c"], SamplingParams(max_tokens=4))
    assert [done.finish_reason for done in found] == ["length", "refused", "length"]
    assert "needs 3 pages" in found[1].reason
    assert found[1].token_ids == ()


def test_mistakes_are_named(llm, folder):
    with pytest.raises(ValueError, match="4 prompts and 1 sampling parameters"):
        llm.generate(PROMPTS, [SamplingParams()])
    with pytest.raises(ValueError, match="KV memory"):
        LLM(folder, kv_memory="a lot")
    with pytest.raises(ValueError, match="coherence domain of 3"):
        LLM(folder, coherence_domain=3)


def test_importing_exflow_loads_no_torch():
    code = "import exflow, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
