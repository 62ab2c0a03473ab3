"""DecodeRecorder: the routing of decode steps, as a RoutingTrace.

A token's layers may be recorded on different ranks; rank 0 puts them together. Shape suffixes: T
tokens, K experts a token, M (token, layer) pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.ranks import Ranks


class DecodeRecorder:
    """Collects what this rank's gates chose."""

    def __init__(self, definition: DecoderDefinition) -> None:
        self._definition = definition
        self._step: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._keys: list[NDArray[np.int64]] = []
        self._experts: list[NDArray[np.int16]] = []
        self._weights: list[NDArray[np.float16]] = []

    def add(
        self, slots_T: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> None:
        """The next MoE layer's choices in the step under way."""
        self._step.append((slots_T, expert_ids_TK, weights_TK))

    def end_step(self, requests_S: NDArray[np.int64], positions_S: NDArray[np.int64]) -> None:
        """The step is over; this is which request and position each slot had."""
        slots_M = torch.cat([slots for slots, _, _ in self._step]).cpu().numpy()
        layers_M = np.repeat(np.arange(len(self._step)), [len(step[0]) for step in self._step])
        self._keys.append(np.stack([requests_S[slots_M], positions_S[slots_M], layers_M], axis=1))
        experts = torch.cat([experts for _, experts, _ in self._step])
        weights = torch.cat([weights for _, _, weights in self._step])
        self._experts.append(experts.cpu().numpy().astype(np.int16))
        self._weights.append(weights.cpu().numpy().astype(np.float16))
        self._step.clear()

    def gather(self, ranks: Ranks, device: torch.device, *, source: str) -> RoutingTrace | None:
        """The whole job's trace, in order of request and position; None if nothing was decoded."""
        top_k, num_layers = self._definition.top_k, len(self._definition.moe_layer_ids)
        keys = _gather(self._keys, np.int64, 3, ranks, device)
        experts = _gather(self._experts, np.int16, top_k, ranks, device)
        weights = _gather(self._weights, np.float16, top_k, ranks, device)
        if len(keys) == 0:
            return None
        order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))
        keys = keys[order].reshape(-1, num_layers, 3)
        return RoutingTrace(
            expert_ids=experts[order].reshape(-1, num_layers, top_k),
            expert_weights=weights[order].reshape(-1, num_layers, top_k),
            sequence_ids=keys[:, 0, 0].astype(np.int32),
            positions=keys[:, 0, 1].astype(np.int32),
            num_experts=self._definition.num_experts,
            model=self._definition.name,
            layer_ids=self._definition.moe_layer_ids,
            phase="decode",
            source=source,
        )


def _gather(
    parts: list[NDArray[np.generic]]
    | list[NDArray[np.int64]]
    | list[NDArray[np.int16]]
    | list[NDArray[np.float16]],
    dtype: type[np.generic],
    width: int,
    ranks: Ranks,
    device: torch.device,
) -> NDArray[np.generic]:
    mine = np.concatenate(parts) if parts else np.empty((0, width), dtype=dtype)
    flat = torch.from_numpy(np.ascontiguousarray(mine, dtype=dtype).view(np.uint8).reshape(-1))
    gathered = torch.cat(ranks.gather_arrays(flat, device)).numpy()
    return gathered.view(dtype).reshape(-1, width)
