"""LLM on two ranks: the completions of one, on both; prompts that differ are refused on both."""

import pytest

from exflow import LLM, SamplingParams, UserError
from exflow.runtime.ranks import Ranks
from harness import run_ranks
from tiny_checkpoints import qwen3_moe, save_byte_tokenizer

pytestmark = pytest.mark.distributed

PROMPTS = ["One", "two and", "three, and a longer one"]
PARAMS = [
    SamplingParams(max_tokens=8),
    SamplingParams(max_tokens=5, temperature=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=1.0, stop=["e", "a", " "]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    qwen3_moe(folder, vocab_size=256, num_hidden_layers=2)
    save_byte_tokenizer(folder)
    return str(folder)


def generate(folder):
    """Completions, who was told of tokens, and what unequal prompts end with."""
    told = []
    rank = Ranks.from_environment().rank
    with LLM(folder, kv_cache_tokens=128, prefill_chunk=4) as llm:
        found = llm.generate(PROMPTS, PARAMS, on_token=told.append)
        try:
            llm.generate([f"I am rank {rank}"])
            problem = ""
        except UserError as error:
            problem = str(error)
    return [(done.token_ids, done.text, done.finish_reason) for done in found], len(told), problem


def test_two_ranks_complete_as_one_does(folder):
    ((alone, told, problem),) = run_ranks(1, generate, folder)
    assert told == sum(len(token_ids) for token_ids, _, _ in alone)
    assert problem == ""
    first, second = run_ranks(2, generate, folder)
    assert first[0] == second[0] == alone
    assert (first[1], second[1]) == (told, 0)
    assert first[2] == second[2]
    assert "rank 1 was not given the same prompts as rank 0" in first[2]
