"""Arrays of a user's files: nothing is unpickled, and what they hold is checked as it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from placement.interop.errors import RecordError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def load_npy(path: Path) -> NDArray[Any]:
    """An array of a .npy file.

    Raises:
        RecordError: if it is not one.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        msg = f"{path}: not a .npy array: {str(error).partition('. ')[0]}"
        raise RecordError(msg) from error
    if not isinstance(array, np.ndarray):
        msg = f"{path}: an archive of arrays, expected a single .npy array"
        raise RecordError(msg)
    return array


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file.

    Raises:
        RecordError: if it is not one, or has numbers that NumPy does not know.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        msg = f"{path}: not a safetensors file of NumPy's types (no bfloat16): {error!r}"
        raise RecordError(msg) from error


def whole_numbers(
    value: object, what: str, *, ndim: int = 1, stop: int | None = None
) -> NDArray[Any]:
    """An array of whole numbers.

    Args:
        value: as a file gives it.
        what: names it in an error.
        ndim: dimensions it must have.
        stop: numbers must be from 0 to below this; None takes any.

    Raises:
        RecordError: for anything else.
    """
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    array = array if array.size else np.zeros(array.shape, dtype=np.int64)
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        msg = f"{what}: expected whole numbers of {ndim} dimension(s), got {str(value)[:60]!r}"
        raise RecordError(msg)
    if stop is not None and array.size and not 0 <= array.min() <= array.max() < stop:
        msg = f"{what} run from {array.min()} to {array.max()}, expected 0 to {stop - 1}"
        raise RecordError(msg)
    return array
