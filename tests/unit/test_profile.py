"""Profiling: what is recorded, from any family of models, however the work is cut up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from exflow.corpus import CorpusError
from exflow.errors import CheckpointError
from exflow.profile import ProfileError, ProfileOptions, profile
from exflow.profiling.batches import Batch, Budget, TokenizedText, make_batches
from exflow.profiling.parts import PartsError, PartsFolder
from exflow.profiling.passes import foretell, run_decode, run_teacher_forced
from exflow.profiling.recorder import NotMoeError, RoutingRecorder
from placement.trace import RoutingTrace

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FOUR_OF_EIGHT = {"num_experts": 8, "num_experts_per_tok": 4}
FAMILIES = {
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 4},
    "Qwen2Moe": FOUR_OF_EIGHT
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": FOUR_OF_EIGHT | {"moe_intermediate_size": 16, "head_dim": 8},
    "Olmoe": FOUR_OF_EIGHT,
    "DeepseekV3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "GptOss": {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 8},
    "Llama4Text": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "intermediate_size_mlp": 16,
        "interleave_moe_layer_step": 1,
        "attn_temperature_tuning": False,
    },
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(family: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def some_batch(*lengths: int) -> Batch:
    rng = np.random.default_rng(0)
    texts = [
        TokenizedText(index=i, subset="A", token_ids=tuple(rng.integers(0, 257, n).tolist()))
        for i, n in enumerate(lengths)
    ]
    return Batch(number=0, texts=tuple(texts))


def router_choices(model, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """(layers) of (tokens, 4): each router's choice, by the module's own output."""
    seen = []

    def note(module, args, output):
        if isinstance(output, tuple) and len(output) == 3:
            order = output[1].sort(dim=1, descending=True, stable=True).indices
            seen.append(output[2].gather(1, order))
        else:
            seen.append(output[1].topk(module.top_k, dim=1).indices)

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if type(module).__name__.lower().endswith(("topkrouter", "llama4router"))
    ]
    with torch.no_grad():
        model(input_ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorder_notes_what_the_routers_chose(family):
    model, batch = tiny_model(family), some_batch(9, 4)
    with RoutingRecorder(model) as recorder:
        recorded = run_teacher_forced(model, recorder, batch)
    for row, text in enumerate(batch.texts):
        choices = router_choices(model, torch.tensor([text.token_ids]))
        mine = recorded.expert_ids[recorded.text == row]
        np.testing.assert_array_equal(mine, torch.stack(choices, dim=1).numpy())
    assert recorder.num_experts == 8
    assert recorder.layer_ids == ((1, 2) if family == "DeepseekV3" else (0, 1, 2))
    assert (np.diff(recorded.expert_weights.astype(float), axis=2) <= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_foretold_is_the_first_layer_s_choice_where_a_text_begins(family):
    model, tokens = tiny_model(family), np.array([200, 3, 77])
    with RoutingRecorder(model) as recorder:
        foretold = foretell(model, recorder, tokens)
        recorded = run_teacher_forced(model, recorder, some_batch(9, 4))
    for token, experts in zip(tokens, foretold, strict=True):
        first = router_choices(model, torch.tensor([[0, token]]))[0][1]
        assert experts.tolist() == first.tolist()
    assert recorded.expert_ids.shape[:2] == (13, len(recorder.layer_ids)), "later passes are whole"


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_a_padded_batch_records_what_each_prompt_alone_does(family):
    model, batch = tiny_model(family), some_batch(7, 3)
    with RoutingRecorder(model) as recorder:
        together = run_decode(model, recorder, batch, new_tokens=5)
        assert together.positions.tolist() == [7, 3, 8, 4, 9, 5, 10, 6, 11, 7]
        for row, text in enumerate(batch.texts):
            alone = Batch(number=0, texts=(text,))
            recorded = run_decode(model, recorder, alone, new_tokens=5)
            mine = together.text == row
            np.testing.assert_array_equal(recorded.positions, together.positions[mine])
            np.testing.assert_array_equal(recorded.expert_ids, together.expert_ids[mine])


def test_decoding_equals_reading_the_text_it_wrote():
    model, batch = tiny_model("Qwen3Moe"), some_batch(6)
    prompt = torch.tensor([batch.texts[0].token_ids])
    written = model.generate(prompt, max_new_tokens=4, do_sample=False)
    with RoutingRecorder(model) as recorder:
        decoded = run_decode(model, recorder, batch, new_tokens=4)
    choices = torch.stack(router_choices(model, written), dim=1)
    np.testing.assert_array_equal(decoded.expert_ids, choices[6:].numpy())


def test_nothing_is_recorded_after_the_end_of_a_text():
    model, batch = tiny_model("Qwen3Moe"), some_batch(6, 5)
    with RoutingRecorder(model) as recorder:
        free = run_decode(model, recorder, batch, new_tokens=6)
        written = model.generate(
            torch.tensor([batch.texts[0].token_ids]), max_new_tokens=7, do_sample=False
        )[0, 6:].tolist()
        recorder.take()
        model.generation_config.eos_token_id = [written[2]]
        ended = run_decode(model, recorder, batch, new_tokens=6)
    first = written.index(written[2])
    assert (free.text == 0).sum() == 6
    assert (ended.text == 0).sum() == first


def test_a_dense_model_is_refused():
    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(NotMoeError, match="give an MoE checkpoint"):
        RoutingRecorder(transformers.AutoModelForCausalLM.from_config(config))


def test_the_hooks_are_gone_after_recording():
    model = tiny_model("Olmoe")
    with RoutingRecorder(model) as recorder:
        pass
    run = torch.tensor([[1, 2, 3]])
    model(run)
    assert recorder.take() == []


def test_batches_hold_every_text_once_and_longest_first_in_a_window():
    texts = [TokenizedText(index=i, subset="", token_ids=(0,) * (i % 5 + 1)) for i in range(100)]
    batches = list(make_batches(iter(texts), 3))
    assert [batch.number for batch in batches] == list(range(len(batches)))
    indices = [text.index for batch in batches for text in batch.texts]
    assert sorted(indices) == list(range(100))
    lengths = [len(text.token_ids) for text in batches[0].texts]
    assert lengths == [5, 5, 5]


def test_a_budget_counts_in_all_and_in_each_subset():
    budget = Budget(total=10, per_subset=6)
    assert budget.left("A") == 6
    budget.spend("A", 6)
    assert budget.left("A") == 0
    assert budget.left("B") == 4
    assert not budget.is_spent([])
    assert budget.is_spent(["A"])
    budget.spend("B", 4)
    assert budget.is_spent([])
    assert Budget(total=None, per_subset=None).left("A") is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Qwen3-MoE checkpoint whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny-moe"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_model("Qwen3Moe").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twenty documents of two subsets; the last is empty."""
    path = tmp_path_factory.mktemp("corpus") / "shard.jsonl"
    rng = np.random.default_rng(0)
    lines = []
    for i in range(20):
        text = "".join(rng.choice(list("abcdef "), size=rng.integers(1, 40))) if i < 19 else ""
        lines.append({"text": text, "meta": {"pile_set_name": "AB"[i % 2]}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def assert_same(one: RoutingTrace, other: RoutingTrace) -> None:
    names = ("expert_ids", "sequence_ids", "positions", "expert_weights", "domain_ids")
    for name in (*names, "foretold_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.domains == other.domains


@pytest.mark.parametrize("mode", ["teacher-forced", "decode"])
def test_a_trace_does_not_depend_on_the_batch_size(checkpoint, corpus, tmp_path, mode):
    traces = [
        profile(
            checkpoint,
            [corpus],
            tmp_path / f"{size}.safetensors",
            options=ProfileOptions(mode=mode, batch_size=size, prompt_tokens=8, new_tokens=4),
        )
        for size in (3, 8)
    ]
    one, other = traces
    np.testing.assert_allclose(one.expert_weights, other.expert_weights, rtol=2e-3, atol=1e-6)
    assert_same(replace(one, expert_weights=other.expert_weights), other)
    assert traces[0].model == "tiny-moe"
    assert traces[0].phase == mode
    assert traces[0].domains == ("A", "B")
    assert traces[0].num_sequences == 19


def test_a_trace_names_the_documents_and_subsets_of_its_tokens(checkpoint, corpus, tmp_path):
    output = tmp_path / "trace.safetensors"
    profile(checkpoint, [corpus], output, options=ProfileOptions(max_length=16, batch_size=4))
    trace = RoutingTrace.load(output)
    lines = Path(corpus).read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    lengths = np.bincount(trace.sequence_ids, minlength=20)
    assert lengths.tolist() == [min(16, len(text)) for text in documents]
    np.testing.assert_array_equal(trace.domain_ids, trace.sequence_ids % 2)
    assert not (tmp_path / "trace.safetensors.parts").exists()


def test_budgets_are_met_exactly(checkpoint, corpus, tmp_path):
    options = ProfileOptions(tokens_per_subset=50)
    trace = profile(checkpoint, [corpus], tmp_path / "a", options=options)
    assert np.bincount(trace.domain_ids).tolist() == [50, 50]
    trace = profile(checkpoint, [corpus], tmp_path / "b", options=ProfileOptions(tokens=77))
    assert trace.num_tokens == 77
    options = ProfileOptions(subsets=("B",), tokens=30)
    trace = profile(checkpoint, [corpus], tmp_path / "c", options=options)
    assert trace.domains == ("B",)
    assert trace.num_tokens == 30


def test_a_killed_run_is_taken_up_again(checkpoint, corpus, tmp_path, monkeypatch):
    output, options = tmp_path / "trace.safetensors", ProfileOptions(batch_size=4)
    whole = profile(checkpoint, [corpus], tmp_path / "whole.safetensors", options=options)
    ran = []

    def run_two(model, recorder, batch):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(batch.number)
        return run_teacher_forced(model, recorder, batch)

    monkeypatch.setattr("exflow.profile.run_teacher_forced", run_two)
    with pytest.raises(KeyboardInterrupt):
        profile(checkpoint, [corpus], output, options=options)
    assert not output.exists()

    def run_more(model, recorder, batch):
        ran.append(batch.number)
        return run_teacher_forced(model, recorder, batch)

    monkeypatch.setattr("exflow.profile.run_teacher_forced", run_more)
    with pytest.raises(PartsError, match="batch_size was 4, now 8"):
        profile(checkpoint, [corpus], output, options=ProfileOptions(batch_size=8))
    assert_same(profile(checkpoint, [corpus], output, options=options), whole)
    assert ran == [0, 1, 2, 3, 4]
    assert not (tmp_path / "trace.safetensors.parts").exists()


def test_bad_lines_are_an_error_or_counted(checkpoint, corpus, tmp_path, caplog):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(corpus).read_text(encoding="utf-8") + "not JSON\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"bad.jsonl, line 21: not JSON"):
        profile(checkpoint, [str(bad)], tmp_path / "a", options=ProfileOptions())
    options = ProfileOptions(skip_bad_lines=True)
    trace = profile(checkpoint, [str(bad)], tmp_path / "b", options=options)
    assert trace.num_sequences == 19
    assert "1 bad lines skipped" in caplog.text


def test_overwriting_drops_the_parts_of_another_run(checkpoint, corpus, tmp_path):
    output = tmp_path / "trace.safetensors"
    PartsFolder(output).open({"batch_size": 3})
    PartsFolder(output).save(0, None)
    options = ProfileOptions(batch_size=16)
    trace = profile(checkpoint, [corpus], output, options=options, overwrite=True)
    assert trace.num_sequences == 19
    assert profile(checkpoint, [corpus], output, options=options, overwrite=True)


def test_a_run_that_finished_no_batch_does_not_bind_the_next(checkpoint, corpus, tmp_path):
    output = tmp_path / "trace.safetensors"
    with pytest.raises(CorpusError, match="no document of the subsets C"):
        profile(checkpoint, [corpus], output, options=ProfileOptions(subsets=("C",)))
    assert profile(checkpoint, [corpus], output, options=ProfileOptions()).num_sequences == 19


def test_mistakes_are_named(checkpoint, corpus, tmp_path):
    output = tmp_path / "trace.safetensors"
    with pytest.raises(ProfileError, match="mode must be one of teacher-forced, decode"):
        ProfileOptions(mode="sampled")
    with pytest.raises(ProfileError, match="batch-size must be at least 1"):
        ProfileOptions(batch_size=0)
    with pytest.raises(CorpusError, match="no document of the subsets C"):
        profile(checkpoint, [corpus], output, options=ProfileOptions(subsets=("C",)))
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "", "meta": {"pile_set_name": "A"}}\n', encoding="utf-8")
    with pytest.raises(ProfileError, match="every document is empty"):
        profile(checkpoint, [str(empty)], tmp_path / "d", options=ProfileOptions())
    output.touch()
    with pytest.raises(ProfileError, match=r"trace.safetensors is there already; give --overwrite"):
        profile(checkpoint, [corpus], output, options=ProfileOptions())
    output.unlink()
    with pytest.raises(CheckpointError, match="no model 'nothing'"):
        profile("nothing", [corpus], output, options=ProfileOptions())
