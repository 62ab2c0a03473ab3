"""Text of tokens as they come, and the strings that end it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """What makes text of tokens; every tokenizer of transformers does."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """The text of tokens."""


class TextStream:
    """The text of one request.

    A few tokens are decoded at a time: from the last place where a character ended, with the
    tokens before it, because what a token spells may depend on its neighbour.

    Attributes:
        text: the text so far, without a stop string.
        is_stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._token_ids: list[int] = []
        self._before = 0
        self._decoded = 0
        self._taken = 0

    def add(self, token_id: int) -> None:
        """The next token has come."""
        self._token_ids.append(token_id)
        known = self._decode(self._token_ids[self._before : self._decoded])
        longer = self._decode(self._token_ids[self._before :])
        if len(longer) <= len(known) or longer.endswith(UNFINISHED):
            return
        self._before, self._decoded = self._decoded, len(self._token_ids)
        first = max(0, len(self.text) - self._longest)
        self.text += longer[len(known) :]
        ends = [self.text.find(stop, first) for stop in self._stop]
        found = [end for end in ends if end >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_stopped = True

    def take(self, *, is_last: bool) -> str:
        """What has come since the last call, but for what may turn out to be a stop string."""
        end = len(self.text)
        if not is_last and not self.is_stopped:
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        start, self._taken = self._taken, max(self._taken, end)
        return self.text[start : self._taken]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of a text that a stop string may begin with.

    >>> _overlap("one tw", "two")
    2
    """
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
