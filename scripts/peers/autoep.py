"""DeepSpeed AutoEP: transformers' MoE blocks replaced by expert-parallel ones.

Dropless; experts in order; a row for every token and expert, and back; a count exchange before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from scripts.peers.hf_decode import data_parallel, load_model
from scripts.peers.interface import main

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.peers.interface import Decode


def load(checkpoint: Path, options: Mapping[str, Any]) -> Decode:
    """DeepSpeed's engine around the model."""
    import deepspeed

    start_deepspeed()
    section = {
        "enabled": True,
        "autoep_size": dist.get_world_size(),
        "preset_model": options.get("preset", "qwen3_moe"),
        "use_grouped_mm": False,
    }
    config = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": section}
    engine, *_ = deepspeed.initialize(model=load_model(checkpoint), config=config)
    engine.eval()
    return data_parallel(engine.module)


def start_deepspeed() -> None:
    """DeepSpeed's collectives on the group there is, without compiling its shared-memory ones."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)


if __name__ == "__main__":
    main(load)
