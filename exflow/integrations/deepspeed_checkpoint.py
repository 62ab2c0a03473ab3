"""What is in a folder that DeepSpeed's `engine.save_checkpoint` wrote for a model with experts.

    global_step100/
        mp_rank_00_model_states.pt                          all but the experts
        layer_0_expert_0_mp_rank_00_model_states.pt         expert 0 of the first MoE layer
        layer_0_expert_1_mp_rank_00_model_states.pt         ...
    latest                                                  "global_step100"

Files are pickles: they are only read as far as `torch.load(weights_only=True)` goes, which runs
nothing from them. Megatron-DeepSpeed keeps its arguments beside the weights, as an
`argparse.Namespace`; that class too is let through, as it only holds values.
"""

from __future__ import annotations

import argparse
import pickle
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from exflow.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DENSE = "mp_rank_00_model_states.pt"
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_KEEP_TENSORS = (
    "state = torch.load(FILE, weights_only=False); torch.save({'module': state['module']}, FILE)"
)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedCheckpoint:
    """The files of one step.

    Attributes:
        folder: where they are.
        experts: by MoE layer, from the first, its files by expert.
    """

    folder: Path
    experts: tuple[tuple[Path, ...], ...]

    @classmethod
    def find(cls, folder: Path) -> DeepSpeedCheckpoint:
        """The files in a folder, or in the step that its `latest` names.

        Raises:
            CheckpointError: files are missing, or belong to a model cut by tensor parallelism.
        """
        step = _step(folder)
        if not (step / DENSE).is_file():
            msg = f"{step} has no {DENSE}; expected a folder written by DeepSpeed"
            raise CheckpointError(msg)
        found: dict[int, dict[int, Path]] = {}
        for path in sorted(step.glob("*mp_rank_*_model_states.pt")):
            match = _EXPERT.fullmatch(path.name)
            if path.name != DENSE and (match is None or int(match[3]) != 0):
                msg = (
                    f"{path}: expected {DENSE} and layer_L_expert_E_{DENSE} only; a model cut by "
                    "tensor parallelism or by ZeRO-3 has to be saved whole first (for ZeRO-3: "
                    "`zero_to_fp32.py` in the checkpoint's folder)"
                )
                raise CheckpointError(msg)
            if match is not None:
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        return cls(folder=step, experts=_in_order(step, found))

    def dense(self) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
        """All tensors but the experts', by name, and Megatron's arguments if they are there."""
        state = load_state(self.folder / DENSE)
        module = state.get("module")
        if not isinstance(module, dict):
            msg = (
                f"{self.folder / DENSE} has no `module`; checkpoints of pipeline parallelism are "
                "not read: save the model with one pipeline stage"
            )
            raise CheckpointError(msg)
        arguments = state.get("args")
        known = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
        version = state.get("checkpoint_version")
        return flatten(module), {**known, "checkpoint_version": version}

    def inner_size(self) -> int:
        """Inner width of an expert.

        Raises:
            CheckpointError: the first expert has no matrix `dense_h_to_4h`.
        """
        path = self.experts[0][0]
        for name, tensor in flatten(load_state(path)).items():
            if name.endswith(".dense_h_to_4h.weight") and tensor.dim() == 2:
                return len(tensor)
        msg = f"{path} has no matrix dense_h_to_4h; converted are experts of Megatron's ParallelMLP"
        raise CheckpointError(msg)

    def layer(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of all experts of a MoE layer, by name."""
        tensors: dict[str, torch.Tensor] = {}
        for path in self.experts[number]:
            tensors.update(flatten(load_state(path)))
        return tensors


def load_state(path: Path) -> dict[str, Any]:
    """A file's dict, without running anything that is in the file.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("Please file an issue")[0].strip()
        msg = (
            f"{path} cannot be read without running code from it: {reason} If you trust it, keep "
            f"its tensors only and convert again: {_KEEP_TENSORS}"
        )
        raise CheckpointError(msg) from error
    except Exception as error:  # torch raises many kinds; all mean that the file is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        msg = f"{path} cannot be read; is it whole? {reason}"
        raise CheckpointError(msg) from error
    if not isinstance(state, dict):
        msg = f"{path} holds a {type(state).__name__}, expected a dict of tensors"
        raise CheckpointError(msg)
    return state


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts, under names joined by dots.

    >>> list(flatten({"embedding": {"word_embeddings": {"weight": torch.zeros(1)}}}))
    ['embedding.word_embeddings.weight']
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            tensors.update(flatten(value, f"{prefix}{name}."))
    return tensors


def _step(folder: Path) -> Path:
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    return folder / latest.read_text(encoding="utf-8", errors="replace").strip()


def _in_order(step: Path, found: dict[int, dict[int, Path]]) -> tuple[tuple[Path, ...], ...]:
    if not found:
        msg = f"{step} has no files layer_L_expert_E_{DENSE}; the model has no DeepSpeed experts"
        raise CheckpointError(msg)
    num_experts = 1 + max(expert for layer in found.values() for expert in layer)
    for layer in range(1 + max(found)):
        missing = sorted(set(range(num_experts)) - set(found.get(layer, {})))
        if missing:
            msg = (
                f"{step}: layer_{layer}_expert_{missing[0]}_{DENSE} is missing; each of the "
                f"{1 + max(found)} MoE layers must have {num_experts} experts"
            )
            raise CheckpointError(msg)
    return tuple(tuple(path for _, path in sorted(found[layer].items())) for layer in sorted(found))
