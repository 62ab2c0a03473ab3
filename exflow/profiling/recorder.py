"""RoutingRecorder: notes the experts each MoE layer of a `transformers` model gives its tokens.

Shapes: T tokens of one forward pass (batch x length), L MoE layers, K experts a token, E experts.

Nearly every MoE block of `transformers` hands its work to a submodule `experts`, called as
`experts(hidden, expert_ids_TK, gate_weights_TK)`. The recorder reads those arguments on the way in:
nothing is replaced, the model computes what it always does, and one recorder serves all families.
Llama 4 calls its experts without ids; there the router's scores (E, of which K are not zero) are read.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torch import Tensor, nn
    from transformers import PreTrainedModel

_LAYER_NUMBER = re.compile(r"\.(?:layers|layer|blocks|block|h)\.(\d+)\.")


class NotMoeError(UserError):
    """A model whose experts cannot be found."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The experts of one forward pass.

    Attributes:
        expert_ids: int16 (T, L, K), by falling weight.
        expert_weights: float16 (T, L, K).
    """

    expert_ids: Tensor
    expert_weights: Tensor


class RoutingRecorder:
    """Records while used as a context manager; `take` hands over what was recorded.

    >>> with RoutingRecorder(model) as recorder:      # doctest: +SKIP
    ...     model(input_ids)
    >>> recorder.take()[0].expert_ids.shape           # doctest: +SKIP
    torch.Size([12, 8, 4])

    Attributes:
        layer_ids: The model's own index of each MoE layer.
        num_experts: Experts a layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._sources = _find_sources(model)
        self.layer_ids = _layer_ids(list(self._sources), type(model).__name__)
        self.num_experts = _num_experts(list(self._sources.values()), model)
        self._passes: list[list[tuple[Tensor, Tensor]]] = []
        self._ends_early = False
        self._removers: list[Callable[[], None]] = []

    def __enter__(self) -> RoutingRecorder:
        for layer, module in enumerate(self._sources.values()):
            hook = _Hook(self, layer)
            handle = (
                module.register_forward_pre_hook(hook.before_experts, with_kwargs=True)
                if _takes_ids(module)
                else module.register_forward_hook(hook.after_router)
            )
            self._removers.append(handle.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._removers:
            self._removers.pop()()

    def note(self, layer: int, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Keeps one layer's routing of the pass under way; layer 0 starts a new pass."""
        if layer == 0:
            self._passes.append([])
        if not self._passes or len(self._passes[-1]) != layer:
            msg = (
                f"MoE layer {self.layer_ids[layer]} ran out of turn; this model cannot be recorded"
            )
            raise UserError(msg)
        self._passes[-1].append(_by_falling_weight(expert_ids_TK, weights_TK))
        if self._ends_early:
            raise _EnoughRecorded

    def take(self) -> list[Routing]:
        """The routing of every forward pass since the last call, on the CPU."""
        passes, self._passes = self._passes, []
        return [
            Routing(
                expert_ids=torch.stack([ids for ids, _ in layers], dim=1).cpu(),
                expert_weights=torch.stack([weights for _, weights in layers], dim=1).cpu(),
            )
            for layers in passes
        ]

    def first_layer(self, run: Callable[[], Any]) -> Tensor:
        """int16 (T, K) what the first MoE layer chooses in a forward pass, which ends there."""
        self._ends_early = True
        try:
            with contextlib.suppress(_EnoughRecorded):
                run()
        finally:
            self._ends_early = False
        ((expert_ids_TK, _),) = self._passes.pop()
        return expert_ids_TK.cpu()


class _EnoughRecorded(Exception):  # noqa: N818
    """The first MoE layer is recorded, and no more is wanted of this pass."""


class _Hook:
    """Reads one layer's routing and notes it."""

    def __init__(self, recorder: RoutingRecorder, layer: int) -> None:
        self._recorder = recorder
        self._layer = layer

    def before_experts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        _, expert_ids, weights = given[:3]
        self._recorder.note(self._layer, expert_ids, weights)

    def after_router(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> None:
        top_k = int(module.top_k)  # type: ignore[arg-type]
        weights, expert_ids = torch.topk(output[0].float(), top_k, dim=-1)
        self._recorder.note(self._layer, expert_ids, weights)


def _by_falling_weight(expert_ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    top_k = expert_ids_TK.shape[-1]
    weights, order = weights_TK.reshape(-1, top_k).float().sort(dim=1, descending=True, stable=True)
    expert_ids = expert_ids_TK.reshape(-1, top_k).gather(1, order)
    return expert_ids.to(torch.int16), weights.to(torch.float16)


def _find_sources(model: nn.Module) -> dict[str, nn.Module]:
    """The module to listen to in each MoE block, by name, in the order of the layers."""
    sources = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts":
            continue
        if _takes_ids(module):
            sources[name] = module
            continue
        router = getattr(model.get_submodule(name.rpartition(".")[0]), "router", None)
        if hasattr(router, "top_k"):
            sources[name] = router
    if not sources:
        msg = (
            f"{type(model).__name__} has no Mixture-of-Experts layer that can be recorded: expected "
            "blocks with a submodule `experts` called with expert ids; give an MoE checkpoint"
        )
        raise NotMoeError(msg)
    return sources


def _takes_ids(module: nn.Module) -> bool:
    """Whether the module is called as `experts(hidden, expert_ids, weights)`."""
    return len(inspect.signature(module.forward).parameters) == 3


def _layer_ids(names: list[str], model: str) -> tuple[int, ...]:
    found = [_LAYER_NUMBER.search(f".{name}.") for name in names]
    layer_ids = tuple(int(match.group(1)) for match in found if match)
    if len(layer_ids) != len(names) or list(layer_ids) != sorted(set(layer_ids)):
        msg = f"cannot tell the layers of {model} apart by the names of its MoE blocks: {names}"
        raise NotMoeError(msg)
    return layer_ids


def _num_experts(modules: list[nn.Module], model: PreTrainedModel) -> int:
    counts = {getattr(module, "num_experts", None) for module in modules}
    if counts == {None}:
        config = model.config.get_text_config()
        counts = {getattr(config, "num_experts", getattr(config, "num_local_experts", None))}
    if len(counts) != 1 or None in counts:
        msg = f"MoE layers of {type(model).__name__} differ in their number of experts: {counts}"
        raise NotMoeError(msg)
    return int(counts.pop())  # type: ignore[arg-type]
