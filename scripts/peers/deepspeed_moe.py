"""Classic DeepSpeed-MoE: `deepspeed.moe.layer.MoE`, without dropping and without random choices.

Experts in order; every rank sends each expert a buffer padded to the fullest one. Its gate weights
are a softmax over all experts for one expert a token, and normalised over the chosen for more: the
output is scaled to the model's own convention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from scripts.peers.autoep import start_deepspeed
from scripts.peers.hf_decode import data_parallel, load_model
from scripts.peers.interface import main

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.peers.interface import Decode


def load(checkpoint: Path, options: Mapping[str, Any]) -> Decode:
    """The model with DeepSpeed's MoE layer in place of every MoE block."""
    start_deepspeed()
    model = load_model(checkpoint)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = ClassicBlock(layer.mlp, model.config)
    return data_parallel(model.eval())


class Expert(nn.Module):
    """A gated expert."""

    def __init__(self, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * expert_size, bias=False)
        self.down = nn.Linear(expert_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Silu of one half times the other."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class ClassicBlock(nn.Module):
    """A MoE block of transformers, run by DeepSpeed's layer."""

    def __init__(self, block: Any, config: Any) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        experts = block.experts
        self.top_k = config.num_experts_per_tok
        self.is_normalised = config.norm_topk_prob
        size = experts.down_proj.shape[2]
        self.layer = MoE(
            config.hidden_size,
            Expert(config.hidden_size, size),
            num_experts=len(experts.down_proj),
            ep_size=dist.get_world_size(),
            k=self.top_k,
            drop_tokens=False,
            min_capacity=0,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.layer.set_deepspeed_parallelism()
        self._copy(block.gate.weight, experts)

    @torch.no_grad()
    def _copy(self, gate: torch.Tensor, experts: Any) -> None:
        moe = self.layer.deepspeed_moe
        moe.gate.wg.weight.copy_(gate)
        first = dist.get_rank() * self.layer.num_local_experts
        for index, expert in enumerate(moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(experts.gate_up_proj[first + index])
            expert.down.weight.copy_(experts.down_proj[first + index])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output, scaled to the model's gate weights."""
        output, _, _ = self.layer(hidden)
        if self.is_normalised != (self.top_k == 1):
            return output
        logits = nn.functional.linear(hidden, self.layer.deepspeed_moe.gate.wg.weight)
        chosen = logits.softmax(dim=-1).topk(self.top_k, dim=-1).values.sum(dim=-1, keepdim=True)
        return output / chosen if self.is_normalised else output * chosen


if __name__ == "__main__":
    main(load)
