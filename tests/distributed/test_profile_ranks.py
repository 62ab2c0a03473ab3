"""Profiling on several ranks: the trace of one rank, a kill and a resumption, mistakes on all ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from exflow.corpus import CorpusError
from exflow.profile import ProfileOptions, profile
from exflow.profiling.parts import PartsError, PartsFolder
from exflow.runtime.ranks import RankFailureError
from harness import PRELOAD, RankError, run_ranks
from placement.trace import RoutingTrace

pytestmark = pytest.mark.distributed

PRELOAD += ["exflow.profile", "transformers.models.olmoe.modeling_olmoe"]  # seconds to import

OPTIONS = ProfileOptions(batch_size=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny OLMoE checkpoint whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-moe"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.5,
        pad_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def write_corpus(path: Path, documents: int) -> str:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(documents):
            text = "".join(rng.choice(list("abcdef "), size=rng.integers(1, 40)))
            line = {"text": text, "meta": {"pile_set_name": "AB"[i % 2]}}
            file.write(json.dumps(line) + "\n")
    return str(path)


def profile_here(checkpoint: str, corpus: str, output: str, options=OPTIONS) -> int | None:
    """What each rank runs: the number of tokens on rank 0, None elsewhere."""
    trace = profile(checkpoint, [corpus], Path(output), options=options, device="cpu")
    return None if trace is None else trace.num_tokens


def profile_until_killed(checkpoint: str, corpus: str, output: str) -> None:
    """Rank 1 kills itself after one batch."""
    save = PartsFolder.save

    def save_and_die(self, batch, trace):
        save(self, batch, trace)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    PartsFolder.save = save_and_die
    profile_here(checkpoint, corpus, output)


def assert_same(one: RoutingTrace, other: RoutingTrace) -> None:
    names = ("expert_ids", "sequence_ids", "positions", "expert_weights", "domain_ids")
    for name in (*names, "foretold_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_trace_does_not_depend_on_the_ranks_even_where_one_has_no_documents(
    checkpoint, tmp_path
):
    corpus = write_corpus(tmp_path / "c.jsonl", documents=5)
    alone, shared = tmp_path / "alone.safetensors", tmp_path / "shared.safetensors"
    profile_here(checkpoint, corpus, str(alone))
    results = run_ranks(4, profile_here, checkpoint, corpus, str(shared))
    one = RoutingTrace.load(alone)
    assert results == [one.num_tokens, None, None, None]
    assert_same(RoutingTrace.load(shared), one)
    assert not (tmp_path / "shared.safetensors.parts").exists()


def test_a_killed_run_is_taken_up_by_another_number_of_ranks(checkpoint, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", documents=12)
    alone, output = tmp_path / "alone.safetensors", tmp_path / "trace.safetensors"
    profile_here(checkpoint, corpus, str(alone))
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(2, profile_until_killed, checkpoint, corpus, str(output))
    parts = tmp_path / "trace.safetensors.parts"
    assert (parts / "batch-000001.safetensors").is_file()
    assert not output.exists()
    with pytest.raises((PartsError, RankFailureError), match="batch_size was 2, now 3"):
        run_ranks(2, profile_here, checkpoint, corpus, str(output), ProfileOptions(batch_size=3))
    run_ranks(4, profile_here, checkpoint, corpus, str(output))
    assert_same(RoutingTrace.load(output), RoutingTrace.load(alone))


def test_a_corpus_without_the_subset_is_an_error_on_every_rank(checkpoint, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", documents=3)
    options = ProfileOptions(subsets=("C",))
    with pytest.raises((CorpusError, RankFailureError), match="no document of the subsets C"):
        run_ranks(2, profile_here, checkpoint, corpus, str(tmp_path / "t"), options)
