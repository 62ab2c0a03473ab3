"""From a configuration to a decoder definition."""

import json

import pytest

from exflow.errors import CheckpointError
from exflow.models.families import define_model
from exflow.models.parts import Router

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "clip_qkv": 8.0,
    "pad_token_id": 0,
    "eos_token_id": 3,
}


@pytest.fixture
def write(tmp_path):
    def write_config(config, **changes):
        folder = tmp_path / "my-model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return write_config


def test_qwen3_moe_has_head_norms_and_dense_layers_where_the_configuration_says(write):
    folder = write(QWEN3, mlp_only_layers=[1], decoder_sparse_step=1, norm_topk_prob=True)
    definition = define_model(folder)
    assert definition.name == "my-model"
    assert definition.attention.qk_norm == "head"
    assert definition.moe_layer_ids == (0, 2, 3)
    assert (definition.expert_size, definition.dense_size) == (32, 96)
    assert (definition.num_experts, definition.top_k) == (8, 2)
    assert definition.router == Router(is_normalized=True)
    assert definition.kv_width == 2 * 2 * 8


def test_a_sparse_step_of_two_makes_every_second_layer_moe(write):
    assert define_model(write(QWEN3, decoder_sparse_step=2)).moe_layer_ids == (1, 3)


def test_olmoe_has_projection_norms_and_clips(write):
    definition = define_model(write(OLMOE))
    assert definition.attention.qk_norm == "projection"
    assert definition.attention.clip_qkv == 8.0
    assert definition.attention.num_kv_heads == 4
    assert definition.attention.head_dim == 16
    assert definition.expert_size == 32
    assert definition.eos_token_ids == (3,)


def test_the_old_and_the_new_way_to_write_rope_theta_mean_the_same(write):
    old = define_model(write(QWEN3, rope_theta=5000.0))
    new = define_model(write(QWEN3, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}))
    assert old.rope == new.rope
    assert old.rope.frequencies[:2] == pytest.approx((1.0, 5000.0**-0.25))


def test_linear_rope_scaling_divides_frequencies(write):
    plain = define_model(write(QWEN3))
    parameters = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    scaled = define_model(write(QWEN3, rope_parameters=parameters))
    assert [f * 4 for f in scaled.rope.frequencies] == pytest.approx(plain.rope.frequencies)


def test_the_generation_configuration_decides_what_ends_a_text(write):
    folder = write(QWEN3, eos_token_id=5)
    assert define_model(folder).eos_token_ids == (5,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert define_model(folder).eos_token_ids == (7, 8)


def test_an_unknown_architecture_is_named_and_the_known_ones_are_listed(write):
    with pytest.raises(
        CheckpointError, match=r"'llama'.*supported: deepseek_v2, .*olmoe, qwen2_moe, qwen3_moe"
    ):
        define_model(write({"model_type": "llama"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
            "dynamic",
        ),
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "no MoE layer"),
    ],
)
def test_what_the_runtime_cannot_do_is_refused_by_name(write, changes, named):
    with pytest.raises(CheckpointError, match=named):
        define_model(write(QWEN3, **changes))


def test_a_configuration_that_is_not_json_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        define_model(tmp_path)
