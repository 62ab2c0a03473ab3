"""Each family: its definition, the layouts of its checkpoints, and what a rank reads of them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt_moe
from exflow.errors import CheckpointError
from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.models.mxfp4 import dequantize
from exflow.models.parts import Activation, LatentAttention, Router, SharedExpert
from exflow.runtime.weights import load_weights
from tiny_checkpoints import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)

CPU = torch.device("cpu")
FAMILIES = {
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "qwen3-moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "gpt-oss": gpt_oss,
    "gpt-top1": gpt_moe.save,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save(tmp_path_factory.mktemp(name) / "tiny") for name, save in FAMILIES.items()}


def load(folder, slots, dtype=torch.float32):
    checkpoint = Checkpoint(folder)
    weights = load_weights(checkpoint, define_model(folder), slots, dtype=dtype, device=CPU)
    return weights, checkpoint.bytes_read


def stored_bytes(folder):
    """Bytes of the experts' tensors, and of all others."""
    tensors = load_file(folder / "model.safetensors")
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    return experts, sum(tensor.nbytes for tensor in tensors.values()) - experts


def with_config(folder, tmp_path, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def with_tensors(folder, tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return with_config(folder, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_its_share_of_the_experts_and_the_dense_part(family, folders):
    folder = folders[family]
    layers = len(define_model(folder).moe_layer_ids)
    experts, dense = stored_bytes(folder)
    everything = load(folder, [range(8)] * layers)[1]
    assert everything == experts + dense
    for slots in ([(1, 6)] * layers, [(), (0, 3, 5), (2,)][:layers]):
        share = experts * sum(map(len, slots)) / (8 * layers)
        assert load(folder, slots)[1] <= 1.01 * (share + dense)
        assert load(folder, slots)[1] >= share


def same_experts(first, second):
    for one, other in zip(first.layers, second.layers, strict=True):
        if one.experts is None:
            assert other.experts is None
            continue
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            a, b = getattr(one.experts, name), getattr(other.experts, name)
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(
    ("family", "stored", "fused", "names"),
    [
        ("mixtral", "block_sparse_moe.", "mlp.", ("w1", "w3", "w2")),
        ("qwen2-moe", "mlp.", "mlp.", ("gate_proj", "up_proj", "down_proj")),
        ("deepseek-v3", "mlp.", "mlp.", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_fused_experts_are_the_same_as_separate_ones(
    family, stored, fused, names, folders, tmp_path
):
    tensors = load_file(folders[family] / "model.safetensors")
    definition = define_model(folders[family])
    for layer in definition.moe_layer_ids:
        old, new = (f"model.layers.{layer}.{block}experts." for block in (stored, fused))
        gate, up, down = (
            torch.stack([tensors.pop(f"{old}{expert}.{name}.weight") for expert in range(8)])
            for name in names
        )
        tensors |= {f"{new}gate_up_proj": torch.cat([gate, up], dim=1), f"{new}down_proj": down}
    tensors = {name.replace(stored, fused): tensor for name, tensor in tensors.items()}
    slots = [(5, 0)] * len(definition.moe_layer_ids)
    separate, separate_bytes = load(folders[family], slots)
    together, fused_bytes = load(with_tensors(folders[family], tmp_path, tensors), slots)
    same_experts(separate, together)
    assert fused_bytes == separate_bytes


def test_mixtral_in_the_hubs_names_is_what_transformers_saves(folders):
    names = load_file(folders["mixtral"] / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


def test_mixtral_has_experts_everywhere_and_weights_that_sum_to_one(folders, tmp_path):
    definition = define_model(folders["mixtral"])
    assert definition.moe_layer_ids == (0, 1, 2)
    assert definition.router == Router(is_normalized=True)
    assert definition.windows == (None, None, None)
    folder = with_config(folders["mixtral"], tmp_path, sliding_window=9)
    assert define_model(folder).windows == (9, 9, 9)


def test_qwen2_moe_has_a_gated_shared_expert_and_biases_before_attention_only(folders):
    definition = define_model(folders["qwen2-moe"])
    assert definition.shared_expert == SharedExpert(size=48, is_gated=True)
    assert definition.attention.qkv_bias
    assert not definition.attention.output_bias
    assert definition.windows == (None, None, None)


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_deepseek_keeps_the_latent_vector_and_one_rotated_key(family, folders):
    definition = define_model(folders[family])
    assert isinstance(definition.attention, LatentAttention)
    assert definition.kv_width == 24 + 8
    assert len(definition.rope.frequencies) == 4
    assert definition.rope.is_interleaved
    assert definition.moe_layer_ids == (1, 2)


def test_deepseek_v2_chooses_groups_by_their_best_expert(folders, tmp_path):
    definition = define_model(folders["deepseek-v2"])
    assert definition.router == Router(
        scale=1.5, num_groups=4, top_groups=2, group_score="best", is_float32=True
    )
    assert definition.shared_expert == SharedExpert(size=64)
    greedy = with_config(folders["deepseek-v2"], tmp_path, topk_method="greedy", n_group=None)
    assert define_model(greedy).router.num_groups == 1


def test_deepseek_v3_has_a_sigmoid_gate_with_a_correction(folders):
    assert define_model(folders["deepseek-v3"]).router == Router(
        score="sigmoid",
        is_normalized=True,
        scale=1.5,
        num_groups=4,
        top_groups=2,
        group_score="best_two",
        has_correction=True,
        is_float32=True,
    )


def test_yarn_scales_deepseeks_attention_by_mscale_all_dim(folders, tmp_path):
    plain = define_model(folders["deepseek-v3"]).attention
    folder = with_config(folders["deepseek-v3"], tmp_path, rope_parameters=YARN)
    mscale = 0.1 * 0.5 * 1.3862943611198906 + 1.0  # log 4
    assert define_model(folder).attention.scale == pytest.approx(plain.scale * mscale**2)


def test_gpt_oss_has_sinks_alternating_windows_and_clamped_experts(folders):
    definition = define_model(folders["gpt-oss"])
    assert definition.attention.has_sinks
    assert definition.windows == (6, None, 6)
    assert definition.router == Router(score="softmax_chosen", has_bias=True)
    assert definition.activation == Activation(
        kind="clamped_silu", alpha=1.702, limit=7.0, has_bias=True
    )


def test_a_gpt_has_experts_in_every_second_layer_and_one_a_token(folders, tmp_path):
    definition = define_model(folders["gpt-top1"])
    assert definition.moe_layer_ids == (1, 3)
    assert definition.top_k == 1
    assert definition.rope is None
    assert definition.norm == "layer"
    assert define_model(with_config(folders["gpt-top1"], tmp_path, moe_every=4)).moe_layer_ids == (
        3,
    )


def test_mxfp4_stands_for_what_transformers_says_it_does():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 135, (2, 6, 3), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for expert in range(2):
        assert torch.equal(dequantize(blocks[expert], scales[expert]).t(), expected[expert])


def test_mxfp4_experts_of_gpt_oss_are_read_as_what_they_stand_for(folders, tmp_path):
    tensors = load_file(folders["gpt-oss"] / "model.safetensors")
    plain, packed = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        for name, (size_out, size_in) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
            full = f"model.layers.{layer}.mlp.experts.{name}"
            shape = (8, size_out, size_in // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(118, 125, shape, dtype=torch.uint8, generator=generator)
            del packed[full]
            packed |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
            plain[full] = torch.stack(
                [dequantize(b, s).t() for b, s in zip(blocks, scales, strict=True)]
            ).contiguous()
    for name, content in {"plain": plain, "packed": packed}.items():
        (tmp_path / name).mkdir()
        with_tensors(folders["gpt-oss"], tmp_path / name, content)
    with_config(
        tmp_path / "packed", tmp_path / "packed", quantization_config={"quant_method": "mxfp4"}
    )
    slots = [(3, 1), (), (7,)]
    same_experts(load(tmp_path / "plain", slots)[0], load(tmp_path / "packed", slots)[0])
    experts, dense = stored_bytes(tmp_path / "packed")
    assert load(tmp_path / "packed", slots)[1] == dense + experts * 3 // 24


def test_the_order_of_rotary_pairs_is_settled_when_weights_are_read(folders, tmp_path):
    """A checkpoint with halves side by side and one with pairs give the same weights."""
    tensors = load_file(folders["deepseek-v3"] / "model.safetensors")
    pairs = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
    for name, tensor in tensors.items():
        if name.endswith("kv_a_proj_with_mqa.weight"):
            tensors[name] = torch.cat([tensor[:24], tensor[24:][pairs]])
        if name.endswith("q_b_proj.weight"):
            heads = tensor.view(4, 24, -1)
            tensors[name] = torch.cat([heads[:, :16], heads[:, 16:][:, pairs]], 1).flatten(0, 1)
    halves = with_tensors(folders["deepseek-v3"], tmp_path, tensors)
    with_config(halves, halves, rope_interleave=False)
    slots = [(), ()]
    for one, other in zip(
        load(folders["deepseek-v3"], slots)[0].layers, load(halves, slots)[0].layers, strict=True
    ):
        assert torch.equal(one.attention.entry, other.attention.entry)
        assert torch.equal(one.attention.query, other.attention.query)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "noaux_tc"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek-v3", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("deepseek-v3", {"topk_group": 1, "num_experts_per_tok": 3}, "3 experts of groups"),
        ("deepseek-v3", {"n_group": 3}, "3 groups"),
        ("gpt-oss", {"quantization_config": {"quant_method": "fp8"}}, "quantized by fp8"),
        ("gpt-top1", {"activation_function": "relu"}, "relu"),
        ("gpt-top1", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ],
)
def test_what_a_family_cannot_do_here_is_refused_by_name(family, changes, named, folders, tmp_path):
    with pytest.raises(CheckpointError, match=named):
        define_model(with_config(folders[family], tmp_path, **changes))


def test_windows_of_a_definition_are_none_unless_given(folders):
    definition = define_model(folders["olmoe"])
    assert replace(definition, windows=()).windows == (None, None, None)
