"""A DeepSpeed checkpoint of a Megatron GPT with experts, as an `exflow_gpt_moe` checkpoint.

Names and layouts change, values do not. Megatron keeps linear layers (out, in) and queries, keys
and values head by head, (heads, 3, head size); GPT-2 keeps (in, out), and all queries first:

    language_model.encoder.layers.1.self_attention.query_key_value.weight
        -> transformer.h.1.attn.c_attn.weight
    language_model.encoder.layers.1.mlp.deepspeed_moe.gate.wg.weight
        -> transformer.h.1.mlp.gate.weight
    ...layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.7.dense_h_to_4h.weight
        -> transformer.h.1.mlp.experts.7.c_fc.weight

The dense part is one shard, the experts of a layer are one each; not more than one is in memory.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from exflow.errors import CheckpointError
from exflow.integrations.deepspeed_checkpoint import DENSE, DeepSpeedCheckpoint
from exflow.integrations.gpt_moe_shapes import check_shapes, dense_shapes, expert_shapes
from exflow.models.checkpoint import INDEX
from exflow.models.gpt_moe import ACTIVATIONS, MODEL_TYPE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

OLDEST_LAYOUT = 2.0  # Megatron's checkpoint_version since which heads come first
_TOP_LEVEL = {
    "word_embeddings": "transformer.wte",
    "position_embeddings": "transformer.wpe",
    "final_layernorm": "transformer.ln_f",
    "output_layer": "lm_head",
}
_IN_LAYER = {
    "input_layernorm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.dense": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
    "mlp.deepspeed_moe.gate.wg": "mlp.gate",
}
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(dense_\w+)")
_OTHER = re.compile(rf"(?:.*\.)?({'|'.join(_TOP_LEVEL)})\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class GptOptions:
    """What a checkpoint does not tell; Megatron's own arguments, where it has them, come first.

    Attributes:
        num_heads: attention heads.
        activation: "gelu_new" (Megatron's fused and OpenAI kinds) or "gelu" (exact).
        norm_eps: epsilon of the norms.
        eos_token_id: the token that ends a text; None: none does.
    """

    num_heads: int | None = None
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            msg = f"--activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}"
            raise CheckpointError(msg)
        if not 0 < self.norm_eps < math.inf:
            msg = f"the epsilon of norms must be a number above 0, got {self.norm_eps}"
            raise CheckpointError(msg)


def convert_deepspeed(source: Path, output: Path, options: GptOptions) -> dict[str, Any]:
    """Write `output` from the checkpoint in `source`.

    Returns:
        The configuration that was written.

    Raises:
        CheckpointError: the checkpoint cannot be read, or computes what our format does not.
    """
    if output.exists() and any(output.iterdir()):
        msg = f"{output} is not empty; give another -o"
        raise CheckpointError(msg)
    checkpoint = DeepSpeedCheckpoint.find(source)
    stored, arguments = checkpoint.dense()
    _check_arguments(arguments)
    tensors = dict(_rename(name, tensor) for name, tensor in stored.items())
    config = _config(tensors, checkpoint, _with_arguments(options, arguments))
    check_shapes(tensors, dense_shapes(config), DENSE)
    for name in [name for name in tensors if ".attn.c_attn." in name]:
        tensors[name] = _heads_last(tensors[name], config["n_head"])
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as folder:
        partial = Path(folder) / output.name
        partial.mkdir()
        _write_shards(checkpoint, tensors, config, partial)
        partial.replace(output)
    return config


def _write_shards(
    checkpoint: DeepSpeedCheckpoint,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    partial: Path,
) -> None:
    """The checkpoint in an empty folder: a shard for the dense part, one for each MoE layer."""
    writer = _ShardWriter(partial, num_shards=1 + len(checkpoint.experts))
    writer.write(tensors)
    for number in range(len(checkpoint.experts)):
        layer = checkpoint.layer(number)
        experts = dict(_rename(name, tensor) for name, tensor in layer.items())
        check_shapes(experts, expert_shapes(config, number), f"layer_{number}_expert_*")
        writer.write(experts)
    writer.finish()
    text = json.dumps(config, indent=2) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")


class _ShardWriter:
    """Shards with an index, as the hub has them."""

    def __init__(self, folder: Path, *, num_shards: int) -> None:
        self._folder = folder
        self._num_shards = num_shards
        self._shard_of: dict[str, str] = {}
        self._shards = 0
        self._total_size = 0

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """One more shard."""
        self._shards += 1
        shard = f"model-{self._shards:05}-of-{self._num_shards:05}.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, self._folder / shard, metadata={"format": "pt"})
        self._shard_of |= dict.fromkeys(contiguous, shard)
        self._total_size += sum(tensor.nbytes for tensor in contiguous.values())

    def finish(self) -> None:
        """The index."""
        index = {"metadata": {"total_size": self._total_size}, "weight_map": self._shard_of}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / INDEX).write_text(text, encoding="utf-8")


def _rename(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Our name for a tensor of Megatron's, and its layout.

    Raises:
        CheckpointError: our format has no such tensor.
    """
    if other := _OTHER.fullmatch(name):
        return f"{_TOP_LEVEL[other[1]]}.{other[2]}", tensor
    match = _LAYER.fullmatch(name)
    if match is None:
        raise CheckpointError(_unknown(name))
    layer, part, kind = match.groups()
    part = part.replace("self_attention.", "attention.")
    if expert := _EXPERT.fullmatch(part):
        dense = _IN_LAYER.get(f"mlp.{expert[2]}", "")
        new = dense.replace("mlp.", f"mlp.experts.{expert[1]}.")
    else:
        new = _IN_LAYER.get(part, "")
    if not new:
        raise CheckpointError(_unknown(name))
    is_linear = kind == "weight" and not new.startswith("ln_") and new != "mlp.gate"
    return f"transformer.h.{layer}.{new}.{kind}", tensor.transpose(0, -1) if is_linear else tensor


def _unknown(name: str) -> str:
    reason = {
        "coefficient": "a residual MoE (mlp_type residual)",
        "mlp.mlp.": "a residual MoE (mlp_type residual)",
        "rotary": "rotary positions",
        "tokentype": "token types",
    }
    known = next((text for part, text in reason.items() if part in name), None)
    what = f"which belongs to {known}" if known else "which no Megatron GPT with experts has"
    return (
        f"the checkpoint has {name!r}, {what}; converted are GPTs with learned positions, layer "
        "norms, and top-1 experts in every n-th layer"
    )


def _heads_last(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Columns (or elements) of (heads, 3, head size) as (3, heads, head size)."""
    parts = tensor.reshape(*tensor.shape[:-1], num_heads, 3, -1)
    return parts.transpose(-3, -2).flatten(-3)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    version = _number(arguments, "checkpoint_version", OLDEST_LAYOUT)
    if not version >= OLDEST_LAYOUT:
        msg = (
            f"Megatron's checkpoint_version is {version}, which keeps queries, keys and values in "
            f"another order; load it once with Megatron-DeepSpeed and save it again"
        )
        raise CheckpointError(msg)
    refused = {
        f"top-{arguments.get('topk')} gates": _number(arguments, "topk", 1) != 1,
        "a residual MoE": arguments.get("mlp_type") == "residual",
        "rotary positions": bool(arguments.get("use_rotary_position_embeddings")),
        "swiglu": bool(arguments.get("swiglu")),
        "residuals after the norm": bool(arguments.get("apply_residual_connection_post_layernorm")),
    }
    for what, is_there in refused.items():
        if is_there:
            msg = f"the model has {what}; converted are top-1 GPTs with learned positions"
            raise CheckpointError(msg)


def _with_arguments(options: GptOptions, arguments: Mapping[str, Any]) -> GptOptions:
    """The options, but for what Megatron's own arguments say."""
    is_exact = arguments.get("bias_gelu_fusion") is False and not arguments.get("openai_gelu")
    return replace(
        options,
        num_heads=_whole(arguments, "num_attention_heads", options.num_heads),
        activation="gelu" if is_exact else options.activation,
        norm_eps=_number(arguments, "layernorm_epsilon", options.norm_eps),
    )


def _number(arguments: Mapping[str, Any], name: str, default: float) -> float:
    """An argument of Megatron's, or the default where it has none.

    Raises:
        CheckpointError: it is no number.
    """
    value = arguments.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value):
        msg = f"{DENSE}: Megatron's {name} is {value!r}, expected a number"
        raise CheckpointError(msg)
    return float(value)


def _whole(arguments: Mapping[str, Any], name: str, default: int | None) -> int | None:
    """A count among Megatron's arguments, or the default where it has none."""
    value = arguments.get(name)
    if value is None:
        return default
    if type(value) is not int:
        msg = f"{DENSE}: Megatron's {name} is {value!r}, expected a whole number"
        raise CheckpointError(msg)
    return value


def _config(
    tensors: Mapping[str, torch.Tensor], checkpoint: DeepSpeedCheckpoint, options: GptOptions
) -> dict[str, Any]:
    """The configuration, as far as sizes of tensors tell it."""
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            msg = f"{DENSE} lacks a matrix that becomes {name}; it is not a whole GPT"
            raise CheckpointError(msg)
    vocab_size, hidden = tensors["transformer.wte.weight"].shape
    num_heads, eos = options.num_heads or 0, options.eos_token_id
    if num_heads < 1 or hidden % num_heads:
        msg = f"{num_heads or 'no'} attention heads for {hidden} elements; give --num-heads"
        raise CheckpointError(msg)
    if eos is not None and not 0 <= eos < vocab_size:
        msg = f"--eos-token-id must be from 0 to {vocab_size - 1}, got {eos}"
        raise CheckpointError(msg)
    num_layers, moe_every = _layers(tensors, len(checkpoint.experts))
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": vocab_size,
        "n_embd": hidden,
        "n_head": num_heads,
        "n_layer": num_layers,
        "n_positions": tensors["transformer.wpe.weight"].shape[0],
        "num_experts_per_tok": 1,
        "moe_every": moe_every,
        "activation_function": options.activation,
        "layer_norm_epsilon": options.norm_eps,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": None,
        "eos_token_id": eos,
        "num_experts": len(checkpoint.experts[0]),
        "n_inner": checkpoint.inner_size(),
    }


def _layers(tensors: Mapping[str, torch.Tensor], num_moe_layers: int) -> tuple[int, int]:
    """How many layers there are, and that every n-th has experts."""
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("transformer.h.")}
    has_gate = [f"transformer.h.{layer}.mlp.gate.weight" in tensors for layer in sorted(layers)]
    moe_every = 1 + has_gate.index(True) if any(has_gate) else 0
    at = [layer for layer, has in enumerate(has_gate) if has]
    if not moe_every or at != list(range(moe_every - 1, len(layers), moe_every)):
        msg = f"layers {at} of {len(layers)} have gates; expected every n-th layer"
        raise CheckpointError(msg)
    if len(at) != num_moe_layers:
        msg = (
            f"{DENSE} has gates in {len(at)} layers, but there are files layer_L_expert_E_{DENSE} "
            f"of {num_moe_layers}; both must be of the same model"
        )
        raise CheckpointError(msg)
    return len(layers), moe_every
