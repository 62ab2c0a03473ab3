"""Loading any `transformers` causal language model, and telling one checkpoint from another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from exflow.errors import CheckpointError
from exflow.models import gpt_moe
from exflow.models.families import model_type_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(folder: str, *, dtype: str, device: str) -> PreTrainedModel:
    """The model on a device, ready for inference.

    Args:
        folder: A checkpoint's folder or a hub id.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, which is slow at the
            others, and the checkpoint's own elsewhere.
        device: A torch device.

    Raises:
        CheckpointError: It cannot be loaded as a causal language model.
    """
    if Path(folder).is_dir() and model_type_of(Path(folder)) == gpt_moe.MODEL_TYPE:
        msg = f"{folder}: transformers does not know this family; use `exflow run --record-trace`"
        raise CheckpointError(msg)
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        msg = f"{folder} cannot be loaded as a causal language model: {error}"
        raise CheckpointError(msg) from error
    return model.to(device).eval()  # type: ignore[no-any-return, arg-type]


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: There is none.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # it warns of families it does not know
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        msg = (
            f"{folder} has no tokenizer that can be loaded; copy the model's tokenizer files "
            f"(tokenizer.json, ...) there: {error}"
        )
        raise CheckpointError(msg) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up where there are no files
        msg = f"{folder} has no tokenizer files (tokenizer.json, ...): copy the model's there"
        raise CheckpointError(msg)
    return tokenizer


def fingerprint(folder: str) -> list[list[Any]]:
    """Name, size and time of each file of a local checkpoint; empty for a hub id."""
    files = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def choose_device(wanted: str, local_rank: int) -> str:
    """The torch device of a rank: its own GPU if there is one, or what was asked for.

    Raises:
        CheckpointError: The device is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return f"cuda:{local_rank % gpus}" if gpus else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        msg = f"no device {wanted!r}: expected auto, cpu, cuda or cuda:N"
        raise CheckpointError(msg) from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        msg = f"no device {wanted!r}: this machine has {gpus} GPUs; use --device auto or cpu"
        raise CheckpointError(msg)
    return f"cuda:{local_rank % gpus}" if wanted == "cuda" else wanted
