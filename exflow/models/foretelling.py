"""What the profiler and the runtime agree on to foretell a token's first experts.

The gate of the first MoE layer is asked about each token with only the beginning of a text before it,
for a token that begins a text itself attends to nothing else and may be like no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SAMPLE = 2048
TOO_COMMON = 0.8  # share of choices; K experts of E have K / E where all are as common


def begin_token(bos_token_id: int | None, eos_token_ids: Sequence[int], vocabulary: int) -> int:
    """The token before a text: the beginning of one, else the end of another, else token 0.

    >>> begin_token(None, (3, 4), 128), begin_token(50256, (), 128)
    (3, 0)
    """
    known = [] if bos_token_id is None else [bos_token_id]
    return next(token for token in (*known, *eos_token_ids, 0) if 0 <= token < vocabulary)


def sample_vocabulary(vocabulary: int) -> NDArray[np.int64]:
    """Tokens by which to judge whether foretelling is any use: evenly spread, the same everywhere."""
    return np.unique(np.linspace(0, vocabulary - 1, SAMPLE).astype(np.int64))


def can_tell_apart(foretold_ids: NDArray[Any]) -> bool:
    """Whether what is foretold for (T, K) choices differs from token to token.

    If the K commonest experts are nearly all that is ever foretold, the gate chooses by the
    context; then tokens start at home, for the ranks of those experts would have them all.

    >>> can_tell_apart(np.array([[1], [2], [3], [2]])), can_tell_apart(np.array([[1]] * 9))
    (True, False)
    """
    common = np.sort(np.bincount(foretold_ids.ravel()))[::-1][: foretold_ids.shape[1]]
    return bool(common.sum() < TOO_COMMON * foretold_ids.size)
