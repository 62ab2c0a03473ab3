"""Requests, how to sample their tokens, and what became of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

FinishReason = Literal["stop", "length", "refused"]


class SamplingError(UserError):
    """Sampling parameters that make no sense."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the so many likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability.
        seed: with the request's index it settles every random choice.
        max_tokens: tokens after which a request ends.
        ignore_eos: go on after an end token of the model, up to `max_tokens`.
        stop: strings that end a text, or one; the text ends before them.
        stop_token_ids: tokens that end a text, beside the model's end tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 64
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple(self.stop)
        ends = _as_tuple(self.stop_token_ids)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ends)
        bounds = {
            "temperature": _is_number(self.temperature) and 0 <= self.temperature < math.inf,
            "top_k": _is_whole(self.top_k) and self.top_k >= 0,
            "top_p": _is_number(self.top_p) and 0 < self.top_p <= 1,
            "seed": _is_whole(self.seed),
            "max_tokens": _is_whole(self.max_tokens) and self.max_tokens >= 1,
            "stop": all(isinstance(text, str) and text for text in stop),
            "stop_token_ids": all(map(_is_whole, ends)),
        }
        expected = {
            "temperature": "a number, at least 0",
            "top_k": "a whole number, at least 0 (0 for all)",
            "top_p": "above 0 and at most 1",
            "seed": "a whole number",
            "max_tokens": "a whole number, at least 1",
            "stop": "strings that are not empty",
            "stop_token_ids": "whole numbers",
        }
        for name, holds in bounds.items():
            if not holds:
                msg = f"{name} must be {expected[name]}, got {getattr(self, name)!r}"
                raise SamplingError(msg)
        for name in ("top_k", "seed", "max_tokens"):
            object.__setattr__(self, name, int(getattr(self, name)))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Its items, those of a set in order, or itself as the only one, to be judged."""
    if isinstance(value, Set):
        return tuple(sorted(value, key=repr))
    return tuple(value) if isinstance(value, Iterable) else (value,)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt.

    Attributes:
        index: its number in the job; its home is rank `index % num_ranks`.
        id: the user's name for it.
        prompt: text, if there is one.
        token_ids: the prompt's tokens.
        params: how to sample.
    """

    index: int
    id: Any
    prompt: str
    token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished request.

    Attributes:
        request: the request.
        token_ids: the new tokens, the one that ended the text included.
        finish_reason: "stop" (end token, stop token or stop string), "length", or "refused".
        text: the new tokens' text, without the stop string; "" where no tokenizer is at hand.
        reason: why it was refused.
    """

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    text: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """One more token of a request, as it is made.

    Attributes:
        request: the request.
        token_id: the token.
        text: what it adds to the text; "" in the middle of a character, and while the end of the
            text may be the beginning of a stop string.
        finish_reason: why it is the last one, if it is.
    """

    request: Request
    token_id: int
    text: str
    finish_reason: FinishReason | None = None
