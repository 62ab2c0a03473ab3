"""Progress on a terminal: requests finished and tokens a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from exflow.runtime.requests import Completion


def with_progress(
    completions: Iterable[Completion], total: int, *, is_shown: bool
) -> Iterator[Completion]:
    """Pass completions on; show how far they are, unless stderr is no terminal."""
    start, num_tokens = time.perf_counter(), 0
    with tqdm(total=total, unit="request", disable=None if is_shown else True) as progress:
        for completion in completions:
            yield completion
            num_tokens += len(completion.token_ids)
            rate = num_tokens / (time.perf_counter() - start)
            progress.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            progress.update()
