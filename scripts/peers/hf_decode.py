"""Greedy decode with a transformers model, data-parallel: each rank its share of the prompts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from scripts.peers.interface import Decoded

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.peers.interface import Decode, Prompts


def load_model(checkpoint: Path) -> Any:
    """The unsharded model, in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def data_parallel(model: Any) -> Decode:
    """Decode with request i on rank i modulo the ranks; all ranks step together."""

    def decode(prompts: Prompts, steps: int) -> Decoded:
        indices = range(dist.get_rank(), len(prompts.token_ids), dist.get_world_size())
        share = torch.tensor([prompts.token_ids[index] for index in indices])
        tokens, seconds = greedy(model, share, steps)
        return Decoded(
            tokens=dict(zip(indices, tokens.tolist(), strict=True)),
            prefill_seconds=seconds[0],
            decode_seconds=sum(seconds[1:]),
            details={"step_seconds": seconds[1:]},
        )

    return decode


@torch.no_grad()
def greedy(model: Any, prompts: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[float]]:
    """(prompts, steps) likeliest tokens, and the seconds of each step, prefill first."""
    cache, current, tokens, seconds = None, prompts, [], []
    for _ in range(steps):
        start = time.perf_counter()
        output = model(input_ids=current, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        current = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(current)
        seconds.append(time.perf_counter() - start)
    return torch.cat(tokens, dim=1), seconds
