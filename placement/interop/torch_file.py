"""Tensors of a `.pt` file, the only form in which SGLang dumps what it recorded.

The one place of `placement` that uses torch: its weights-only loader is the safe reader of this
format (nothing is unpickled but tensors and plain containers). Everything else works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.interop.errors import RecordError

if TYPE_CHECKING:
    from pathlib import Path


def load_pt(path: Path) -> dict[str, Any]:
    """The dictionary in a `.pt` file, tensors as NumPy arrays.

    Raises:
        RecordError: if the file is unsafe or unreadable, or torch is not installed.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        msg = f"{path}: reading a .pt dump needs torch, which is not installed here; `pip install torch`"
        raise RecordError(msg) from error
    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
        data = _to_numpy(data, torch.Tensor)
    except Exception as error:  # torch raises many kinds; all mean that the file cannot be used
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        msg = f"{path}: torch's weights-only loader refuses it: {reason}"
        raise RecordError(msg) from error
    if not isinstance(data, dict):
        msg = f"{path}: holds a {type(data).__name__}, expected a dictionary"
        raise RecordError(msg)
    return data


def _to_numpy(value: Any, tensor: Any) -> Any:
    if isinstance(value, tensor):
        value = value.detach()
        return np.asarray(value.double() if value.is_floating_point() else value)
    if isinstance(value, dict):
        return {key: _to_numpy(item, tensor) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_numpy(item, tensor) for item in value]
    return value
