"""Reading checkpoints: only what is needed, and errors that name the tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from exflow.errors import CheckpointError
from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.runtime.weights import load_weights
from tiny_checkpoints import qwen3_moe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen3_moe(tmp_path_factory.mktemp("whole"), mlp_only_layers=[1])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return qwen3_moe(
        tmp_path_factory.mktemp("sharded"), mlp_only_layers=[1], max_shard_size="100KB"
    )


def load(folder, slots, dtype=torch.float32):
    checkpoint = Checkpoint(folder)
    weights = load_weights(checkpoint, define_model(folder), slots, dtype=dtype, device=CPU)
    return weights, checkpoint


def test_rows_of_a_tensor_are_read_and_counted_alone(folder):
    checkpoint = Checkpoint(folder)
    rows = checkpoint.read("model.layers.0.mlp.gate.weight", slice(2, 4))
    assert rows.shape == (2, 64)
    assert checkpoint.bytes_read == 2 * 64 * 4


def test_a_rank_reads_the_dense_part_and_its_own_experts_only(folder):
    expert = 3 * 64 * 32 * 4
    _, nothing = load(folder, [(), ()])
    _, some = load(folder, [(1, 5), (7,)])
    _, everything = load(folder, [range(8), range(8)])
    total = sum(
        t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values()
    )
    assert some.bytes_read == nothing.bytes_read + 3 * expert
    assert everything.bytes_read == total


def test_shards_give_the_same_weights_as_one_file(folder, sharded):
    whole, _ = load(folder, [(3, 0), (2,)])
    parts, _ = load(sharded, [(3, 0), (2,)])
    assert torch.equal(whole.layers[0].experts.gate_up, parts.layers[0].experts.gate_up)
    assert torch.equal(whole.layers[2].experts.down, parts.layers[2].experts.down)
    assert torch.equal(whole.head, parts.head)
    assert parts.layers[1].experts is None


def test_fused_experts_give_the_same_weights_as_separate_ones(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts."

        def take(name, prefix=prefix):
            return torch.stack([tensors.pop(f"{prefix}{e}.{name}.weight") for e in range(8)])

        tensors[prefix + "gate_up_proj"] = torch.cat([take("gate_proj"), take("up_proj")], dim=1)
        tensors[prefix + "down_proj"] = take("down_proj")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    separate, _ = load(folder, [(3, 0), (2,)])
    fused, checkpoint = load(tmp_path, [(3, 0), (2,)])
    for layer in (0, 2):
        for name in ("gate_up", "down"):
            expected = getattr(separate.layers[layer].experts, name)
            assert torch.equal(getattr(fused.layers[layer].experts, name), expected)
    assert checkpoint.bytes_read == load(folder, [(3, 0), (2,)])[1].bytes_read


def test_weights_come_in_the_wanted_format(folder):
    weights, _ = load(folder, [(0,), ()], dtype=torch.bfloat16)
    assert weights.layers[0].experts.down.dtype == torch.bfloat16
    assert weights.embedding.dtype == torch.bfloat16
    assert weights.layers[2].experts.down.shape == (0, 32, 64)


def test_a_missing_tensor_is_named(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2\.mlp\.gate\.weight'"):
        load(tmp_path, [(), ()])


def test_a_shape_that_contradicts_the_configuration_is_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"moe_intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"shape \(32, 64\), config.json makes it \(16, 64\)"):
        load(tmp_path, [(0,), ()])


def test_a_folder_without_weights_is_a_user_error(tmp_path):
    with pytest.raises(CheckpointError, match="expected safetensors"):
        Checkpoint(tmp_path)


def test_a_truncated_file_is_a_user_error(folder, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Checkpoint(tmp_path)


def test_an_index_that_names_a_missing_shard_fails_when_it_is_read(sharded, tmp_path):
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model-00001-of-00010.safetensors").unlink(missing_ok=True)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load(tmp_path, [(), ()])
