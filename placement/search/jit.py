"""Compilation of the hot loops: the only import of numba.

Compiled functions never allocate, so they are compiled without numba's reference counting (four
times faster here); `Word` and `Number` name the NumPy scalars that they pass around.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

from numba import njit
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Word: TypeAlias = Any
Number: TypeAlias = Any
Array: TypeAlias = NDArray[Any]
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}


def kernel(function: Function) -> Function:
    """Compiles a function to machine code, kept on disk for the next start."""
    return cast("Function", njit(**OPTIONS)(function))
