"""Permuted checkpoints of tiny random models: transformers computes the same with them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from placement.interop import checkpoint
from placement.interop.errors import ExportError
from placement.interop.hf_records import choose_experts
from placement.interop.model_shape import ModelShape
from placement.interop.safetensors_rows import read_header
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "qwen3-moe": Qwen3MoeConfig(
        **SMALL, num_experts=8, moe_intermediate_size=12, mlp_only_layers=[0]
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=8),
    "gpt-oss": GptOssConfig(**SMALL, num_local_experts=8),
    "deepseek-v3": DeepseekV3Config(
        **{**SMALL, "head_dim": None},
        n_routed_experts=8,
        moe_intermediate_size=12,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}


def make_plan(shape, *, groups_together=False, ranks=2, seed=1):
    """Random experts on each rank, two consecutive ones (a group) kept together if asked."""
    rng = np.random.default_rng(seed)
    slots = []
    for _ in shape.moe_layers:
        if groups_together:
            order = (rng.permutation(4)[:, None] * 2 + [0, 1]).ravel()
        else:
            order = rng.permutation(8)
        slots.append(tuple(tuple(int(e) for e in part) for part in np.split(order, ranks)))
    return PlacementPlan(
        model="tiny",
        num_experts=8,
        layer_ids=shape.moe_layers,
        topology=Topology(num_nodes=1, ranks_per_node=ranks),
        strategy=Strategy(name="test"),
        slots=tuple(slots),
    )


def save_model(folder, name, *, shard_size="50GB"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "router" in key or "gate." in key or "correction_bias" in key or "bias" in key:
                tensor.copy_(torch.randn_like(tensor) * 0.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return logits_of(folder)


def logits_of(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    ids = torch.arange(48).reshape(2, 24) % 64
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_permuted_checkpoint_gives_the_same_logits(tmp_path, name):
    before = save_model(tmp_path / "a", name)
    shape = ModelShape.from_config(tmp_path / "a")
    plan = make_plan(shape, groups_together=shape.num_groups > 1)
    checkpoint.export(plan, shape, tmp_path / "a", tmp_path / "b")
    after = logits_of(tmp_path / "b")
    assert torch.allclose(before, after, rtol=0, atol=1e-6)
    assert files_differ(tmp_path / "a", tmp_path / "b")


def files_differ(one, other):
    name = "model.safetensors"
    return (one / name).read_bytes() != (other / name).read_bytes()


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    save_model(folder, "mixtral")
    return folder


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), ranks=st.sampled_from([1, 2, 4, 8]))
def test_a_checkpoint_permuted_by_any_plan_is_read_back_as_that_plan(
    tiny_mixtral, tmp_path_factory, seed, ranks
):
    shape = ModelShape.from_config(tiny_mixtral)
    plan = make_plan(shape, ranks=ranks, seed=seed)
    folder = tmp_path_factory.mktemp("permuted") / "model"
    checkpoint.export(plan, shape, tiny_mixtral, folder)
    read = checkpoint.read_plan(folder, ranks)
    again = read.to_plan(plan.topology, model="tiny", source="")
    assert np.array_equal(again.hosts(), plan.hosts())
    assert again.layer_ids == plan.layer_ids


def test_the_expert_at_each_position_is_the_one_in_the_plans_slot(tmp_path):
    save_model(tmp_path / "a", "mixtral")
    shape = ModelShape.from_config(tmp_path / "a")
    plan = make_plan(shape)
    checkpoint.export(plan, shape, tmp_path / "a", tmp_path / "b")
    read = checkpoint.read_plan(tmp_path / "b", plan.num_ranks)
    assert np.array_equal(
        read.to_plan(plan.topology, model="tiny", source="").hosts(), plan.hosts()
    )
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / x).model.layers[2] for x in "ab")
    order = [e for on_rank in read.slots[2] for e in on_rank]
    assert torch.equal(new.mlp.gate.weight, old.mlp.gate.weight[order])
    assert torch.equal(new.mlp.experts.down_proj, old.mlp.experts.down_proj[order])


def test_a_sharded_checkpoint_keeps_its_shards_and_a_true_index(tmp_path):
    before = save_model(tmp_path / "a", "qwen3-moe", shard_size="20KB")
    shape = ModelShape.from_config(tmp_path / "a")
    checkpoint.export(make_plan(shape), shape, tmp_path / "a", tmp_path / "b")
    index = json.loads((tmp_path / "b" / checkpoint.INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for name, shard in index.items():
        assert name in read_header(tmp_path / "b" / shard)[0]
    assert torch.allclose(before, logits_of(tmp_path / "b"), rtol=0, atol=1e-6)


def test_a_plan_that_tears_a_group_apart_is_refused_with_the_layer(tmp_path):
    save_model(tmp_path / "a", "deepseek-v3")
    shape = ModelShape.from_config(tmp_path / "a")
    with pytest.raises(ExportError, match="layer 1 would tear a group apart"):
        checkpoint.export(make_plan(shape, seed=3), shape, tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_replicas_and_a_full_target_folder_are_refused(tmp_path):
    save_model(tmp_path / "a", "mixtral")
    shape = ModelShape.from_config(tmp_path / "a")
    plan = make_plan(shape)
    with pytest.raises(ExportError, match="not empty"):
        checkpoint.export(plan, shape, tmp_path / "a", tmp_path / "a")
    replicated = PlacementPlan(
        **{
            **vars(plan),
            "slots": tuple((ranks[0], (*ranks[1], ranks[0][0])) for ranks in plan.slots),
        }
    )
    with pytest.raises(ExportError, match="replicas"):
        checkpoint.export(replicated, shape, tmp_path / "a", tmp_path / "b")


def test_a_checkpoint_whose_router_is_not_recognised_is_refused(tmp_path):
    save_model(tmp_path / "a", "mixtral")
    shape = ModelShape.from_config(tmp_path / "a")
    source = tmp_path / "a" / "model.safetensors"
    source.write_bytes(source.read_bytes().replace(b".gate.weight", b".wate.weight"))
    with pytest.raises(ExportError, match="layer 0: no router found"):
        checkpoint.export(make_plan(shape), shape, tmp_path / "a", tmp_path / "b")


def test_our_top_k_of_logits_is_that_of_transformers_deepseek_v3_router(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["deepseek-v3"])
    router = model.model.layers[2].mlp.gate
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_()
        hidden = torch.randn(200, 16)
        theirs = router(hidden)
        logits = torch.nn.functional.linear(hidden, router.weight)
    chosen = next(t for t in theirs if not t.is_floating_point())
    CONFIGS["deepseek-v3"].save_pretrained(tmp_path)
    ours, _ = choose_experts(
        logits.numpy(), ModelShape.from_config(tmp_path), router.e_score_correction_bias.numpy()
    )
    assert np.array_equal(np.sort(ours, axis=1), np.sort(chosen.numpy(), axis=1))
