"""Compilation of the hot loops: the only import of numba.

Compiled functions never allocate, so they are compiled without numba's reference counting (four
times faster here); `Word` and `Number` name the NumPy scalars that they pass around.

Numba's cache asks only whether the file of a function has changed, not the files of the functions
that it calls, so a kernel here is compiled again when any file of this folder has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from numba import njit
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Word: TypeAlias = Any
Number: TypeAlias = Any
Array: TypeAlias = NDArray[Any]
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}


def sources() -> str:
    """A hash of all files of this folder that kernels may be in."""
    texts = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


SOURCES = sources()


def kernel(function: Function) -> Function:
    """Compiles a function to machine code, kept on disk for the next start.

    Where no folder can be written to, each start compiles anew.
    """
    try:
        compiled = njit(**OPTIONS)(function)
    except RuntimeError:  # numba's word for a cache without a place
        compiled = njit(**OPTIONS | {"cache": False})(function)
    cache = getattr(compiled, "_cache", None)  # none under NUMBA_DISABLE_JIT
    if cache is not None and hasattr(cache, "_cache_file"):
        cache._cache_file._source_stamp = SOURCES
    return cast("Function", compiled)
