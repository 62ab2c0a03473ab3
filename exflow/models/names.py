"""WeightNames: what a family's checkpoints call their tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """The names of a checkpoint's tensors; those below `layer` follow its prefix.

    Experts are stored one by one (`experts` + "7." + `gate` + ".weight") or fused into
    `experts` + "gate_up_proj" and `experts` + "down_proj"; both are read.

    Attributes:
        positions: learned positions.
        shared: prefix of the shared expert.
        shared_gate: the weights of its gate.
        qkv: queries, keys and values in one projection; None where there are three.
        correction: the router's correction bias.
        is_transposed: linear layers are stored (in, out), as GPT-2's are, not (out, in).
        fused_is_transposed: fused experts are stored (in, out), gate and up columns alternating,
            as gpt-oss has them; or (out, in), first the gate.
        renamed: (new, old): where a tensor's name is not found, `old` in it is `new`.
    """

    embedding: str = "model.embed_tokens.weight"
    positions: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    attention: str = "self_attn."
    qkv: str | None = None
    output: str = "o_proj"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    dense: str = "mlp."
    router: str = "mlp.gate"
    correction: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts."
    shared: str = "mlp.shared_experts."
    shared_gate: str = "mlp.shared_expert_gate.weight"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    is_transposed: bool = False
    fused_is_transposed: bool = False
    renamed: tuple[str, str] | None = None
