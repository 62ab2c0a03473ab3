"""DecodeRecorder: the routing of decode steps, as a RoutingTrace.

A token's layers may be recorded on different ranks; rank 0 puts them together. Shape suffixes: T
tokens, K experts a token, M (token, layer) pairs, S slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import torch

from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.ranks import Ranks

Foretell: TypeAlias = "Callable[[NDArray[np.int64]], NDArray[np.int16] | None]"
Scalar = TypeVar("Scalar", np.int64, np.int16, np.float16)


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

    def end_step(
        self,
        requests_S: NDArray[np.int64],
        positions_S: NDArray[np.int64],
        tokens_S: NDArray[np.int64],
    ) -> None:
        """The step is over; this is which request, position and token each slot had."""
        slots_M = torch.cat([slots for slots, _, _ in self._step]).cpu().numpy()
        layers_M = np.repeat(np.arange(len(self._step)), [len(step[0]) for step in self._step])
        of_slot = [requests_S[slots_M], positions_S[slots_M], layers_M, tokens_S[slots_M]]
        self._keys.append(np.stack(of_slot, axis=1))
        experts = torch.cat([experts for _, experts, _ in self._step])
        weights = torch.cat([weights for _, _, weights in self._step])
        self._experts.append(experts.cpu().numpy().astype(np.int16))
        self._weights.append(weights.cpu().numpy().astype(np.float16))
        self._step.clear()

    def gather(
        self, ranks: Ranks, device: torch.device, *, source: str, foretell: Foretell
    ) -> RoutingTrace | None:
        """The whole job's trace, in order of request and position; None if nothing was decoded.

        Args:
            ranks: this rank.
            device: where messages between ranks are made.
            source: what was decoded.
            foretell: `Engine.foretell`.
        """
        top_k, num_layers = self._definition.top_k, len(self._definition.moe_layer_ids)
        keys = _gather(self._keys, np.empty((0, 4), np.int64), ranks, device)
        experts = _gather(self._experts, np.empty((0, top_k), np.int16), ranks, device)
        weights = _gather(self._weights, np.empty((0, top_k), np.float16), ranks, device)
        if len(keys) == 0:
            return None
        order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))
        keys = keys[order].reshape(-1, num_layers, 4)
        return RoutingTrace(
            expert_ids=experts[order].reshape(-1, num_layers, top_k),
            expert_weights=weights[order].reshape(-1, num_layers, top_k),
            sequence_ids=keys[:, 0, 0].astype(np.int32),
            positions=keys[:, 0, 1].astype(np.int32),
            foretold_ids=foretell(keys[:, 0, 3]),
            num_experts=self._definition.num_experts,
            model=self._definition.name,
            layer_ids=self._definition.moe_layer_ids,
            phase="decode",
            source=source,
        )


def _gather(
    parts: list[NDArray[Scalar]],
    like: NDArray[Scalar],
    ranks: Ranks,
    device: torch.device,
) -> NDArray[Scalar]:
    """The rows of all ranks; `like` has none, and their type and width."""
    flat = torch.from_numpy(np.concatenate([like, *parts]).view(np.uint8).reshape(-1))
    gathered = torch.cat(ranks.gather_arrays(flat, device)).numpy()
    return gathered.view(like.dtype).reshape(-1, like.shape[1])
