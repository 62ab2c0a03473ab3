"""What DeepSpeed saves of a GPT with experts is read by our loader, and gives the same logits."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch

from decoding import Model, decode, make_case, make_plan
from deepspeed_gpt import Sizes, save_with_deepspeed
from exflow.errors import CheckpointError
from exflow.integrations.deepspeed_checkpoint import load_state
from exflow.integrations.deepspeed_conversion import GptOptions, convert_deepspeed
from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from harness import run_ranks

pytestmark = pytest.mark.distributed

pytest.importorskip("deepspeed", reason="needs the extra [deepspeed]")

SIZES = Sizes()
OPTIONS = GptOptions(num_heads=SIZES.heads)
IDS = torch.randint(2, SIZES.vocab, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that DeepSpeed wrote from two ranks with two experts each, and its logits."""
    folder = tmp_path_factory.mktemp("deepspeed") / "checkpoint"
    logits, same = run_ranks(2, save_with_deepspeed, str(folder), SIZES, IDS)
    assert torch.equal(logits, same)
    return folder, logits.numpy()


@pytest.fixture
def copied(saved, tmp_path):
    """The saved files, to be spoilt."""
    return shutil.copytree(saved[0], tmp_path / "copy") / "step1"


def run_decode(model, prompts):
    """The logits after each prompt, by request, on this rank and the others."""
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    plan = make_plan(model.definition, num_ranks, "random")
    return decode(model, make_case(plan, max_tokens=1), prompts).logits


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logits_are_those_of_the_deepspeed_modules(saved, tmp_path, num_ranks):
    folder, expected = saved
    convert_deepspeed(folder, tmp_path / "converted", OPTIONS)
    model = Model(
        str(tmp_path / "converted"), define_model(tmp_path / "converted"), tokens=[], logits=[]
    )
    prompts = [row[:end].tolist() for row in IDS for end in range(1, len(row) + 1)]
    found = {}
    for logits in run_ranks(num_ranks, run_decode, model, prompts):
        found |= logits
    assert len(found) == len(prompts)
    for (request, position), logits in found.items():
        row, end = divmod(request, IDS.shape[1])
        assert position == end + 1
        difference = np.abs(logits - expected[row, end]).max()
        assert difference <= 1e-5 * np.abs(expected).max()


def test_every_expert_keeps_its_number(saved, tmp_path):
    folder, _ = saved
    config = convert_deepspeed(folder, tmp_path / "converted", OPTIONS)
    checkpoint = Checkpoint(tmp_path / "converted")
    for layer, number in ((1, 0), (3, 1)):
        for expert in range(SIZES.experts):
            name = f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"
            stored = load_state(folder / "step1" / name)
            weight = next(w for key, w in stored.items() if key.endswith("h_to_4h.weight"))
            ours = checkpoint.read(f"transformer.h.{layer}.mlp.experts.{expert}.c_fc.weight")
            assert torch.equal(ours, weight.t())
    assert config["num_experts"] == SIZES.experts
    assert config["moe_every"] == 2
    index = json.loads((tmp_path / "converted/model.safetensors.index.json").read_text())
    shards = {(tmp_path / "converted" / shard) for shard in index["weight_map"].values()}
    assert len(shards) == 3
    assert all(shard.is_file() for shard in shards)


def test_megatrons_arguments_are_believed(copied, tmp_path):
    dense = copied / "mp_rank_00_model_states.pt"
    state = load_state(dense)
    state["args"] = argparse.Namespace(
        num_attention_heads=2, layernorm_epsilon=1e-3, bias_gelu_fusion=False, openai_gelu=False
    )
    state["checkpoint_version"] = 3.0
    torch.save(state, dense)
    config = convert_deepspeed(copied, tmp_path / "converted", GptOptions(num_heads=8))
    assert config["n_head"] == 2
    assert config["layer_norm_epsilon"] == 1e-3
    assert config["activation_function"] == "gelu"


def test_the_nested_dicts_that_megatron_saves_are_read_alike(saved, copied, tmp_path):
    path = copied / "mp_rank_00_model_states.pt"
    state = load_state(path)
    module = {name.removeprefix("language_model."): t for name, t in state["module"].items()}
    nested = {"embedding": {"word_embeddings": {}, "position_embeddings": {}}, "encoder": {}}
    for name, tensor in module.items():
        first, _, rest = name.partition(".")
        if first == "embedding":
            table, _, kind = rest.partition(".")
            nested["embedding"][table][kind] = tensor
        else:
            nested["encoder"][rest] = tensor
    torch.save(state | {"module": {"language_model": nested}}, path)
    convert_deepspeed(saved[0], tmp_path / "flat", OPTIONS)
    convert_deepspeed(copied, tmp_path / "nested", OPTIONS)
    files = sorted(file.name for file in (tmp_path / "flat").iterdir())
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "flat" / file).read_bytes() == (tmp_path / "nested" / file).read_bytes()


class NotPlain:
    """Something whose pickle runs code."""


def add_object(folder):
    torch.save({"module": {}, "extra": NotPlain()}, folder / "mp_rank_00_model_states.pt")


def remove_expert(folder):
    (folder / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()


def add_tensor_parallel_rank(folder):
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")


def remove_dense(folder):
    (folder / "mp_rank_00_model_states.pt").unlink()


def truncate_expert(folder):
    path = folder / "layer_0_expert_1_mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:100])


def shrink_expert(folder):
    path = folder / "layer_0_expert_1_mp_rank_00_model_states.pt"
    torch.save({name: tensor[:8] for name, tensor in load_state(path).items()}, path)


def add_tensor(folder, name):
    path = folder / "mp_rank_00_model_states.pt"
    state = load_state(path)
    state["module"][name] = torch.zeros(2, SIZES.hidden)
    torch.save(state, path)


def make_residual(folder):
    add_tensor(folder, "language_model.encoder.layers.1.mlp.coefficient.weight")


def make_rotary(folder):
    add_tensor(folder, "language_model.rotary_pos_emb.inv_freq")


def change_state(**more):
    def change(folder):
        path = folder / "mp_rank_00_model_states.pt"
        torch.save(load_state(path) | more, path)

    return change


def change_dense(name, change):
    """A spoiler that changes a tensor of layer 1, or takes it away."""

    def spoil(folder):
        path = folder / "mp_rank_00_model_states.pt"
        state = load_state(path)
        name_there = f"language_model.encoder.layers.1.{name}"
        state["module"][name_there] = change(state["module"][name_there])
        torch.save(state, path)

    return spoil


def flatten_embedding(folder):
    path = folder / "mp_rank_00_model_states.pt"
    state = load_state(path)
    state["module"]["language_model.embedding.word_embeddings.weight"] = torch.zeros(7)
    torch.save(state, path)


def remove_moe_layer(folder):
    for path in folder.glob("layer_1_expert_*"):
        path.unlink()


def damage_dense(folder):
    path = folder / "mp_rank_00_model_states.pt"
    path.write_bytes(b"\x80\x02]a.")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (add_object, "keep its tensors only and convert again"),
        (remove_expert, "layer_1_expert_2_mp_rank_00_model_states.pt is missing"),
        (add_tensor_parallel_rank, "cut by tensor parallelism"),
        (remove_dense, "has no mp_rank_00_model_states.pt"),
        (truncate_expert, "layer_0_expert_1_mp_rank_00_model_states.pt"),
        (shrink_expert, "expected"),
        (make_residual, "residual MoE"),
        (make_rotary, "rotary positions"),
        (change_state(checkpoint_version=1.0), "checkpoint_version is 1.0"),
        (change_state(checkpoint_version=0), "checkpoint_version is 0"),
        (change_state(checkpoint_version=math.nan), "checkpoint_version is nan"),
        (
            change_state(args=argparse.Namespace(num_attention_heads=2.5)),
            "num_attention_heads is 2.5, expected a whole number",
        ),
        (
            change_state(args=argparse.Namespace(topk=[1, 1])),
            r"topk is \[1, 1\], expected a number",
        ),
        (change_state(args=argparse.Namespace(layernorm_epsilon=math.nan)), "epsilon is nan"),
        (change_state(args=argparse.Namespace(layernorm_epsilon=0)), "above 0, got 0"),
        (
            change_dense("input_layernorm.weight", lambda _: None),
            "h.1.ln_1.weight has shape nothing",
        ),
        (change_dense("post_attention_layernorm.bias", lambda t: t[:3]), "ln_2.bias has shape"),
        (change_dense("self_attention.query_key_value.bias", lambda t: t[1:]), "c_attn.bias has"),
        (change_dense("self_attention.query_key_value.weight", lambda t: t[None]), "c_attn.weight"),
        (
            change_dense("mlp.deepspeed_moe.gate.wg.weight", lambda t: t[:3]),
            "gate.weight has shape",
        ),
        (flatten_embedding, "lacks a matrix that becomes transformer.wte.weight"),
        (remove_moe_layer, "gates in 2 layers, but there are files .* of 1"),
        (damage_dense, "cannot be read; is it whole"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_what_to_do(copied, tmp_path, spoil, message):
    spoil(copied)
    with pytest.raises(CheckpointError, match=message):
        convert_deepspeed(copied, tmp_path / "converted", OPTIONS)
    assert not (tmp_path / "converted").exists()


def test_a_pickle_that_would_run_code_does_not(copied, tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"module": Evil()}, copied / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="without running code"):
        convert_deepspeed(copied, tmp_path / "converted", OPTIONS)
    assert not (tmp_path / "ran").exists()


def test_heads_must_be_told_where_megatron_did_not(saved, tmp_path):
    with pytest.raises(CheckpointError, match="give --num-heads"):
        convert_deepspeed(saved[0], tmp_path / "converted", GptOptions())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("norm_eps", math.nan, "above 0, got nan"),
        ("eos_token_id", 9999, "--eos-token-id must be from 0 to 127"),
    ],
)
def test_options_that_no_model_has_are_refused(saved, tmp_path, option, value, message):
    with pytest.raises(CheckpointError, match=message):
        convert_deepspeed(
            saved[0], tmp_path / "converted", GptOptions(num_heads=SIZES.heads, **{option: value})
        )
    assert not (tmp_path / "converted").exists()
