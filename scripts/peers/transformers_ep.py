"""transformers' own expert parallelism: all-to-all token dispatch (`ep_dispatch_experts`).

Only experts are sharded: FSDP of the dense part, which `from_pretrained` would add, would put
weights on the wire. Experts in order; a row for every token and expert, and back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from scripts.peers.hf_decode import data_parallel, load_model
from scripts.peers.interface import main

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.peers.interface import Decode


def load(checkpoint: Path, options: Mapping[str, Any]) -> Decode:
    """The model with its experts spread over all ranks."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    model = load_model(checkpoint)
    plan = {f"model.{name}": style for name, style in model.config.base_model_ep_plan.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apply_expert_parallelism(model, mesh, None, plan)
    return data_parallel(model)


if __name__ == "__main__":
    main(load)
